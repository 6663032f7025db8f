"""Examples to batches: bucketed lengths, and a composition that is a pure function of seed and step.

Shape letters: B rows of a batch, T tokens, R target tokens (the positions that predict them).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from spa_jax.data.encoding import Example


class Batch(NamedTuple):
    """B examples, padded on the right; a row beyond the data has no weight anywhere. Integers are int32."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    """Real tokens of each row."""
    predict: Int[np.ndarray, "B R"]
    """Which position's output predicts each target."""
    targets: Int[np.ndarray, "B R"]
    weights: Float[np.ndarray, "B R"]
    """1 for a target token, 0 for padding; float32."""


def padded_length(length: int, least: int) -> int:
    """The padded length: the next of least, 1.5 least, 2 least, 3 least, 4 least, ..., so that few programs compile."""
    size = least
    while size < length:
        size *= 2
    return size * 3 // 4 if size * 3 // 4 >= max(length, least) else size


def padded_shape(example: Example) -> tuple[int, int]:
    """Padded (T, R) of an example; a batch holds examples of one bucket."""
    return padded_length(len(example.tokens), 32), padded_length(len(example.predict), 8)


def plan_batches(examples: Sequence[Example], batch_size: int, seed: int | None = None) -> grain.MapDataset:
    """Which rows make up each step's batch: `plan(...)[step]` is int32 `[B]`, -1 for a row beyond the data.

    An epoch, `len(plan)` steps, holds every example once; with a seed, each epoch has its own order and its own
    batches, and without one the order is that of the buckets, for evaluation. Any step can be read at once, so the
    position of a run is its step.
    """
    buckets = defaultdict(list)
    for row, example in enumerate(examples):
        buckets[padded_shape(example)].append(row)

    def pad(rows: Sequence[int]) -> np.ndarray:
        return np.array([*rows, *[-1] * (batch_size - len(rows))], np.int32)

    # Grain adds the epoch to the seed, so neighbouring seeds would give one run shifted by an epoch.
    seeds = None if seed is None else np.random.SeedSequence(seed).generate_state(len(buckets) + 1)
    parts = []
    for number, (_, rows) in enumerate(sorted(buckets.items())):
        part = grain.MapDataset.source(rows)
        if seeds is not None:
            part = part.shuffle(seed=int(seeds[number]))
        parts.append(part.batch(batch_size, batch_fn=pad))
    whole = grain.MapDataset.concatenate(parts)
    return whole if seeds is None else whole.shuffle(seed=int(seeds[-1]))


def collate(examples: Sequence[Example], rows: Int[np.ndarray, " B"], shape: tuple[int, int] | None = None) -> Batch:
    """The batch of these rows, padded to their bucket, or to the one given where they are a part of a batch."""
    chosen = [examples[row] for row in rows if row >= 0]
    length, width = shape or padded_shape(chosen[0])
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
    """The batches in order, read ahead by a few threads."""
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
