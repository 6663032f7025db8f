"""Choosing tokens, against a plain reference and the distribution it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.sampling import Sampling, filter_logits, sample
from spa_jax.errors import UserError

KEY = jax.random.key(0)
ROWS, WIDTH = 20_000, 6
choose = jax.jit(lambda key, logits, sampling: sample(jax.random.split(key, logits.shape[0]), logits, sampling))
"""Compiled once: all tests here have logits of `ROWS` by `WIDTH`."""


def kept_by_hand(row, top_k, top_p):
    """Tokens likeliest first, until there are k of them or their probabilities reach p."""
    probabilities = np.exp(np.float64(row) - max(row))
    probabilities /= probabilities.sum()
    kept, mass = set(), 0.0
    for token in np.argsort(-row):
        if kept and (len(kept) == top_k or mass >= top_p):
            break
        kept.add(int(token))
        mass += probabilities[token]
    return kept


@pytest.fixture(scope="module")
def filtered():
    """(logits, k, p) -> the set of tokens kept in each row, compiled once."""
    compiled = jax.jit(filter_logits)

    def run(logits, top_k, top_p):
        out = np.asarray(compiled(jnp.asarray(logits, jnp.float32), jnp.int32([top_k]), jnp.float32([top_p])))
        np.testing.assert_array_equal(out[np.isfinite(out)], np.float32(logits)[np.isfinite(out)])
        return [set(np.flatnonzero(row > -np.inf).tolist()) for row in out]

    return run


@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_top_k_and_top_p_keep_what_the_reference_keeps(filtered, top_k, top_p):
    logits = (2 * np.random.default_rng(0).standard_normal((16, 60))).astype(np.float32)
    assert filtered(logits, top_k, top_p) == [kept_by_hand(row, top_k, top_p) for row in logits]


def test_top_p_one_keeps_tokens_below_float_resolution(filtered):
    logits = 10 * np.random.default_rng(2).standard_normal((16, 60))
    assert filtered(logits, 0, 1.0) == [set(range(60))] * 16


def test_tokens_as_likely_as_the_last_kept_are_kept_too(filtered):
    row = np.array([1.0, 3.0, 2.0, 2.0, 2.0, -1.0] + [-50.0] * 54)
    logits = np.tile(row, (16, 1))
    assert filtered(logits, 2, 1.0)[0] == {1, 2, 3, 4}
    assert filtered(logits, 1, 1.0)[0] == {1}
    assert filtered(np.zeros((16, 60)), 1, 1e-6)[0] == set(range(60))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-9)])
def test_greedy_by_any_name_is_argmax(sampling):
    logits = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    tokens = choose(KEY, logits, sampling)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_greedy_takes_the_first_of_equals():
    logits = np.tile(np.float32([0, 2, 1, 2, 2, 0]), (ROWS, 1))
    assert set(choose(KEY, logits, Sampling()).tolist()) == {1}


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(1.0), 6),
        (Sampling(0.5), 6),
        (Sampling(2.0), 6),
        (Sampling(0.7, top_k=3), 3),
        (Sampling(1.0, top_p=0.7), 3),
    ],
    ids=str,
)
def test_frequencies_are_the_softmax_at_that_temperature_within_what_is_kept(sampling, support):
    row = np.float32([0.1, 1.4, -1.0, 0.9, 0.0, 1.2])
    counts = np.bincount(choose(KEY, np.tile(row, (ROWS, 1)), sampling), minlength=WIDTH)
    weights = np.exp(row / sampling.temperature)
    weights[np.argsort(-row)[support:]] = 0
    expected = ROWS * weights / weights.sum()
    assert not counts[weights == 0].any()
    chi_square = (((counts - expected) ** 2)[weights > 0] / expected[weights > 0]).sum()
    assert chi_square < 20  # 5 degrees of freedom: 1 in 800 by chance, and the seed is fixed


def test_the_key_decides_the_draw():
    logits = np.zeros((ROWS, WIDTH), np.float32)
    draws = [choose(jax.random.key(seed), logits, Sampling(1.0)).tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_changing_the_sampling_compiles_nothing():
    for sampling in (Sampling(), Sampling(0.7, 5, 0.9), Sampling(1.3, 0, 0.5)):
        choose(KEY, np.zeros((ROWS, WIDTH), np.float32), sampling)
    assert choose._cache_size() == 1


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(temperature=-0.1), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.1), "top_p"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(sampling, name):
    with pytest.raises(UserError, match=f"^{name} is "):
        sampling.check()
    assert Sampling(0.7, 40, 0.9).check() == Sampling(0.7, 40, 0.9)


def test_each_row_is_sampled_in_its_own_way():
    """As it is alone, greedy ones too."""
    logits = jnp.asarray(np.float32(np.random.default_rng(3).standard_normal((4, 50))))
    keys = jax.random.split(jax.random.key(1), 4)
    each = [Sampling(), Sampling(1.0, 5, 0.8), Sampling(3.0), Sampling(0.7, 0, 0.5)]
    together = sample(keys, logits, Sampling(*(jnp.asarray(leaf) for leaf in zip(*each))))
    alone = [sample(keys[at : at + 1], logits[at : at + 1], each[at])[0] for at in range(4)]
    assert together.tolist() == jnp.stack(alone).tolist()
