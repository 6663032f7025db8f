"""Batches of examples: padded to few shapes, and composed as a pure function of seed and step.

Shape letters: B rows of a batch, T tokens, R target tokens (the positions that predict them).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from spa_jax.data.encoding import Example
from spa_jax.data.padding import padded_length


class Batch(NamedTuple):
    """B examples, padded on the right. A row beyond the data has weight 0 everywhere. Integers are int32."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    """Tokens of each row without padding."""
    predict: Int[np.ndarray, "B R"]
    """Which position's output predicts each target."""
    targets: Int[np.ndarray, "B R"]
    weights: Float[np.ndarray, "B R"]
    """1 for a target token, 0 for padding; float32."""


Shape = tuple[int, int]
"""Padded T and R."""
WORTH_COMPILING = 4
"""Batches of the longest shape that a shape of its own must save in an epoch, since it needs a program of its own."""


def padded_shape(example: Example) -> Shape:
    """Returns the padded (T, R) of an example by itself."""
    return padded_length(len(example.tokens), 32), padded_length(len(example.predict), 8)


def padded_shapes(examples: Sequence[Example], batch_size: int) -> list[Shape]:
    """Chooses the padded (T, R) of every example; all examples of a batch have the same."""
    own = [padded_shape(example) for example in examples]
    merged = merge_shapes(Counter(own), batch_size)
    return [merged[shape] for shape in own]


def merge_shapes(counts: Mapping[Shape, int], batch_size: int) -> dict[Shape, Shape]:
    """Merges neighbouring shapes such that padding and compiling together cost least: few rows have one shape, and of
    very many every shape stays as it is.

    Args:
        counts: how many examples have each shape by themselves.
        batch_size: B.

    Returns:
        The shape that each of them is padded to.
    """
    shapes = sorted(counts)
    best: list[tuple[int, int, Shape]] = [(0, 0, (0, 0))]
    """The least cost of the first 0, 1, 2, ... shapes, where the last of the merged ones begins, and its shape."""
    for end in range(1, len(shapes) + 1):
        options = []
        for begin in range(end):
            part = shapes[begin:end]
            together = max(length for length, _ in part), max(width for _, width in part)
            batches = -(-sum(counts[shape] for shape in part) // batch_size)
            cost = batches * sum(together) + WORTH_COMPILING * sum(shapes[-1])
            options.append((best[begin][0] + cost, begin, together))
        best.append(min(options))
    merged: dict[Shape, Shape] = {}
    end = len(shapes)
    while end:
        _, begin, together = best[end]
        merged |= dict.fromkeys(shapes[begin:end], together)
        end = begin
    return merged


def plan_batches(examples: Sequence[Example], batch_size: int, seed: int | None = None) -> grain.MapDataset:
    """Plans the rows of each step's batch: `plan_batches(...)[step]` is int32 `[B]`, with -1 for a row beyond the data.

    An epoch, `len(plan_batches(...))` steps, holds every example once. With a seed, each epoch has its own order and
    its own batches; without one, batches are ordered by padded shape, for evaluation. Any step can be read at once, so
    a run resumes from its step alone.
    """
    rows_by_shape = defaultdict(list)
    for row, shape in enumerate(padded_shapes(examples, batch_size)):
        rows_by_shape[shape].append(row)

    def pad(rows: Sequence[int]) -> np.ndarray:
        return np.array([*rows, *[-1] * (batch_size - len(rows))], np.int32)

    # Grain adds the epoch to the seed, so neighbouring seeds would give one run shifted by an epoch.
    seeds = None if seed is None else np.random.SeedSequence(seed).generate_state(len(rows_by_shape) + 1)
    parts = []
    for number, (_, rows) in enumerate(sorted(rows_by_shape.items())):
        part = grain.MapDataset.source(rows)
        if seeds is not None:
            part = part.shuffle(seed=int(seeds[number]))
        parts.append(part.batch(batch_size, batch_fn=pad))
    whole = grain.MapDataset.concatenate(parts)
    return whole if seeds is None else whole.shuffle(seed=int(seeds[-1]))


def collate(examples: Sequence[Example], rows: Int[np.ndarray, " B"], shape: Shape | None = None) -> Batch:
    """Pads rows and stacks them.

    Args:
        examples: all examples.
        rows: indices into them; -1 is a row beyond the data.
        shape: padded (T, R); by default the least that holds these rows.
    """
    chosen = [examples[row] for row in rows if row >= 0]
    length, width = shape or np.max([padded_shape(example) for example in chosen], axis=0).tolist()
    tokens = np.zeros((len(rows), length), np.int32)
    lengths = np.zeros(len(rows), np.int32)
    predict, targets = np.zeros((2, len(rows), width), np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    for i, example in enumerate(chosen):
        count = len(example.predict)
        tokens[i, : len(example.tokens)] = example.tokens
        lengths[i] = len(example.tokens)
        predict[i, :count] = example.predict
        targets[i, :count] = example.targets
        weights[i, :count] = 1
    return Batch(tokens, lengths, predict, targets, weights)


def prefetched(batches: grain.MapDataset) -> Iterator[Any]:
    """Iterates over the batches in order, made ahead of time by a few threads."""
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
