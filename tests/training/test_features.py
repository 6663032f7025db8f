"""One backbone pass with the common beginning of all rows run once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.data.encoding import Example
from spa_jax.training.features import extract, run_prefix
from spa_jax.training.sources import common_prefix


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("length", [1, 5, 7])
def test_features_after_a_common_prefix_are_those_of_the_whole(everywhere, length, world):
    tokens = world.batch.tokens.copy()
    tokens[:, :length] = tokens[0, :length]
    batch = world.batch._replace(tokens=tokens)
    program = jax.jit(extract, static_argnums=(0, 3))
    expected = program(world.model, world.frozen, batch, everywhere)
    prefix = run_prefix(world.model, world.frozen, jnp.asarray(tokens[:1, :length]))
    found = program(world.model, world.frozen, batch, everywhere, prefix)
    assert [leaf.shape for leaf in found] == [leaf.shape for leaf in expected]
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


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
