"""One backbone pass with the common beginning of all rows run once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.data.encoding import Example
from spa_jax.training.features import Kept, extract, find_answers, run_prefix
from spa_jax.training.sources import common_prefix


@pytest.mark.parametrize(
    ("entry", "kept"),
    [("head", Kept()), ("head", Kept(True)), (2, Kept(keys=True)), (0, Kept(True, True))],
    ids=["head", "head, attending", "keys above block 2", "all states"],
)
@pytest.mark.parametrize("length", [1, 7])
def test_features_after_a_common_prefix_are_those_of_the_whole(entry, kept, length, world):
    tokens = world.batch.tokens.copy()
    tokens[:, :length] = tokens[0, :length]
    batch = world.batch._replace(tokens=tokens)
    program = jax.jit(extract, static_argnums=(0, 3))
    model = world.model.clone(entry=entry, taps=(0,) if entry == 0 else world.model.taps)
    expected = program(model, world.frozen, batch, kept)
    prefix = run_prefix(model, world.frozen, jnp.asarray(tokens[:1, :length]))
    found = program(model, world.frozen, batch, kept, prefix)
    assert (found.keys is not None) == kept.keys
    if kept.keys:  # what stands in slots of padding means nothing
        real = np.arange(tokens.shape[1]) < batch.lengths[:, None]
        found, expected = (
            f._replace(keys={name: np.where(real[:, None, None, None], leaf, 0) for name, leaf in f.keys.items()})
            for f in (found, expected)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_an_answer_begins_where_predicting_positions_do_not_follow_each_other(world):
    predict = np.array([[3, 4, 5, 9, 10, 14, 0, 0], [0, 1, 7, 8, 0, 0, 0, 0]], np.int32)
    weights = np.array([[1] * 6 + [0] * 2, [1] * 4 + [0] * 4], np.float32)
    batch = world.batch._replace(predict=predict, weights=weights, lengths=np.array([15, 9], np.int32))
    answer_starts = [[3, 3, 3, 9, 9, 14], [0, 0, 7, 7]]
    for found in (find_answers(batch), jax.jit(find_answers)(batch)):
        for row, expected in enumerate(answer_starts):
            assert np.asarray(found.answer_starts)[row, : len(expected)].tolist() == expected
            assert np.all(np.asarray(found.predict)[row, len(expected) :] > 1000)


def example(tokens, first):
    count = len(tokens) - first
    return Example(np.int32(tokens), np.arange(first, len(tokens), dtype=np.int32), np.zeros(count, np.int32))


def test_the_common_prefix_ends_where_rows_differ_or_predict():
    rows = [example([5, 6, 7, 8, 9], 3), example([5, 6, 7, 1], 3), example([5, 6, 7, 8, 2, 3], 4)]
    assert common_prefix(rows).tolist() == [5, 6, 7]
    assert common_prefix([*rows, example([5, 6, 0, 0], 2)]).tolist() == [5, 6]
    assert common_prefix([*rows, example([5, 6, 7, 8], 1)]).tolist() == [5]
    assert common_prefix([*rows, example([4, 6, 7, 8], 3)]).tolist() == []
    assert common_prefix([]).tolist() == []
