"""Hypotheses that share a row of the cache, against each one's whole text without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.cache import cache_bytes, count_slots, init_cache, place_newest, prompt_slot_mask, take_rows
from spa_jax.decoding.hypotheses import parent_rows
from spa_jax.models.block import PADDING, positions_from_mask
from spa_jax.models.llama import Llama

LENGTHS, WIDTH, NEW = np.array([4, 9]), 3, 6


@pytest.mark.slow
def test_hypotheses_that_share_a_row_see_the_prompt_and_their_own_tokens(tiny_config, tiny_params):
    """A random tree; the first group pauses at the third step, and the slots hold garbage to begin with."""
    rng, model = np.random.default_rng(0), Llama(tiny_config)
    run = jax.jit(functools.partial(model.apply, {"params": tiny_params}))
    slots = count_slots(9, NEW, WIDTH)
    cache = jax.tree.map(lambda leaf: leaf + 1e4, init_cache(tiny_config, 2, slots, jnp.float32))
    prompts = rng.integers(0, 97, (2, 9)).astype(np.int32)
    mask = np.arange(9)[None] < LENGTHS[:, None]
    cache = run(prompts, positions_from_mask(jnp.asarray(mask)), cache).cache
    slot_mask, num_generated = prompt_slot_mask(jnp.asarray(LENGTHS), WIDTH, slots), np.array([1, 1])
    texts = [[prompts[group, : LENGTHS[group]].tolist()] * WIDTH for group in range(2)]
    for step in range(NEW):
        active = np.array([step != 2, True])
        tokens = rng.integers(0, 97, (2, WIDTH)).astype(np.int32)
        position = LENGTHS + num_generated - 1
        places, slot_mask = place_newest(slot_mask, *map(jnp.asarray, (position, num_generated, active)))
        positions = np.broadcast_to(np.where(active, position, PADDING)[:, None], tokens.shape)
        out = run(tokens, positions.astype(np.int32), cache, places)
        cache, num_generated = out.cache, num_generated + active
        for group in np.flatnonzero(active):
            texts[group] = [[*text, token] for text, token in zip(texts[group], tokens[group].tolist())]
            whole = jnp.asarray(texts[group], jnp.int32)
            alone = run(whole, jnp.broadcast_to(jnp.arange(whole.shape[1]), whole.shape)).hidden[:, -1]
            np.testing.assert_allclose(out.hidden[group], alone, atol=1e-5)
        parents = np.where(active[:, None], rng.integers(0, WIDTH, (2, WIDTH)), np.arange(WIDTH))
        slot_mask = take_rows(slot_mask, parent_rows(jnp.asarray(parents)))
        texts = [[texts[group][parent] for parent in parents[group]] for group in range(2)]


def test_a_search_keeps_a_prompt_once(tiny_config):
    def taken(groups, width):
        return cache_bytes(tiny_config, groups, count_slots(960, 16, width), jnp.float32)

    assert taken(1, 4) < 1.1 * taken(1, 1) < 0.3 * taken(4, 1)
