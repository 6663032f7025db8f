"""Batches: their composition, shapes and contents."""

import itertools
from collections import Counter

import numpy as np
import pytest

from spa_jax.data.encoding import Example
from spa_jax.data.padding import padded_length
from spa_jax.data.pipeline import WORTH_COMPILING, collate, merge_shapes, padded_shape, padded_shapes, plan_batches

BATCH = 4


@pytest.fixture(scope="module")
def examples():
    """503 examples of several padded shapes."""
    rng = np.random.default_rng(0)

    def make():
        prompt, count = rng.integers(5, 60), rng.integers(1, 11)
        tokens = rng.integers(1, 1000, prompt + count - 1, np.int32)
        predict = np.arange(prompt - 1, prompt + count - 1, dtype=np.int32)
        return Example(tokens, predict, rng.integers(1, 1000, count, np.int32))

    return [make() for _ in range(503)]


def composition(steps, start, stop):
    return [tuple(steps[step].tolist()) for step in range(start, stop)]


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_an_epoch_holds_every_example_once_in_batches_of_one_padded_shape(examples, seed):
    steps, shapes = plan_batches(examples, BATCH, seed), padded_shapes(examples, BATCH)
    assert 1 < len(set(shapes)) < len({padded_shape(example) for example in examples})
    epochs = 1 if seed is None else 4
    for epoch in range(epochs):
        batches = composition(steps, epoch * len(steps), (epoch + 1) * len(steps))
        rows = [row for batch in batches for row in batch if row >= 0]
        assert sorted(rows) == list(range(len(examples)))
        for batch in batches:
            assert len(batch) == BATCH
            assert len({shapes[row] for row in batch if row >= 0}) == 1
            assert sorted(batch, key=lambda row: row < 0) == list(batch), "padding stands last"


def test_only_the_last_batch_of_a_padded_shape_is_partial(examples):
    steps = plan_batches(examples, BATCH, seed=3)
    sizes = Counter(padded_shapes(examples, BATCH))
    assert len(steps) == sum(-(-size // BATCH) for size in sizes.values())


def test_any_step_can_be_read_at_once_in_any_order_by_a_fresh_plan(examples):
    length = len(plan_batches(examples, BATCH, seed=5))
    expected = composition(plan_batches(examples, BATCH, seed=5), 0, 3 * length)
    fresh = plan_batches(examples, BATCH, seed=5)
    for step in np.random.default_rng(1).permutation(3 * length):
        assert tuple(fresh[int(step)].tolist()) == expected[step]


def test_epochs_and_seeds_have_their_own_order_and_their_own_batches(examples):
    def epochs_of(seed):
        steps = plan_batches(examples, BATCH, seed)
        return [composition(steps, e * len(steps), (e + 1) * len(steps)) for e in range(2)]

    shapes = padded_shapes(examples, BATCH)

    def shapes_of(batches):
        return [shapes[batch[0]] for batch in batches]

    orders = [*epochs_of(5), *epochs_of(500)]
    for one, other in itertools.combinations(orders, 2):
        assert shapes_of(one) != shapes_of(other)
        shared = {frozenset(batch) for batch in one} & {frozenset(batch) for batch in other}
        assert len(shared) < len(one) / 3


def test_without_a_seed_the_order_is_that_of_the_padded_shapes(examples):
    steps, shapes = plan_batches(examples, BATCH), padded_shapes(examples, BATCH)
    ordered = [shapes[batch[0]] for batch in composition(steps, 0, len(steps))]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("rows", [1, 10, 100, 10_000])
def test_shapes_are_merged_as_an_exhaustive_search_merges_them(rows):
    rng = np.random.default_rng(rows)
    shapes = sorted({(32 * int(t), 8 * int(r)) for t, r in rng.integers(1, 9, (7, 2))})
    counts = dict(zip(shapes, rng.integers(1, rows + 1, len(shapes)).tolist()))

    def cost(parts):
        worth = WORTH_COMPILING * sum(shapes[-1])
        padded = [np.max(part, axis=0).sum() * -(-sum(counts[shape] for shape in part) // BATCH) for part in parts]
        return sum(padded) + worth * len(parts)

    def splits(left):
        for count in range(1, len(left) + 1):
            for rest in splits(left[count:]) if left[count:] else [[]]:
                yield [left[:count], *rest]

    merged = merge_shapes(counts, BATCH)
    parts = [
        [shape for shape in shapes if merged[shape] == to] for to in dict.fromkeys(merged[each] for each in shapes)
    ]
    assert cost(parts) == min(map(cost, splits(shapes)))
    assert all(tuple(np.max(part, axis=0)) == merged[part[0]] for part in parts)
    assert {1: 1, 10_000: len(shapes)}.get(rows, len(parts)) == len(parts)


def test_all_lengths_up_to_512_make_few_shapes():
    assert len({padded_length(length, 32) for length in range(1, 513)}) == 9


def test_collate_holds_its_examples_and_nothing_else(examples):
    steps = plan_batches(examples, BATCH, seed=2)
    for step in range(len(steps)):
        rows = steps[step]
        batch = collate(examples, rows)
        chosen = [examples[row] for row in rows if row >= 0]
        length, width = np.max([padded_shape(example) for example in chosen], axis=0)
        assert batch.tokens.shape == (BATCH, length)
        assert batch.predict.shape == batch.targets.shape == batch.weights.shape == (BATCH, width)
        assert [array.dtype for array in batch] == [*[np.int32] * 4, np.float32]
        for i, example in enumerate(chosen):
            assert batch.lengths[i] == len(example.tokens)
            for padded, real in zip((batch.tokens, batch.predict, batch.targets), example):
                np.testing.assert_array_equal(padded[i, : len(real)], real)
                assert not padded[i, len(real) :].any()
            np.testing.assert_array_equal(batch.weights[i], np.arange(width) < len(example.targets))
        for array in batch:
            assert not array[len(chosen) :].any(), "a row beyond the data has no weight anywhere"
