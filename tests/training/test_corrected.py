"""Corrected states over the cached prompt against one run of the whole backbone for each turn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.models.block import RopeScaling
from spa_jax.models.llama import Llama
from spa_jax.training.corrected import at_targets, corrected_row, run_upper, run_upper_with_alternatives
from spa_jax.training.features import Kept, extract
from tests.conftest import TINY
from tests.training.by_turns import (
    LENGTH,
    corrected_positions,
    every_position,
    flip_each,
    make_backbone,
    make_rows,
    random,
    run_by_turns,
    take,
    take_each,
)

LINEAR = RopeScaling("linear", 3.0)
LLAMA3 = RopeScaling("llama3", 4.0, original_max_position_embeddings=12)


@functools.partial(jax.jit, static_argnums=0)
def compare(model, frozen, batch, corrections, others):
    """Computes f at the targets with their states moved by corrections `[B,T,D]`, and each with its own state alone
    moved by `others` instead: over the cached prompt, and by whole runs."""
    found, expected = {}, {}
    everywhere = Kept(states_everywhere=True)
    for kept, edits in ((Kept(keys=True), "targets"), (everywhere, "targets"), (everywhere, "all")):
        row = corrected_row(model, frozen, extract(model, frozen, batch, kept), edits == "all")
        moves = (corrections, others) if edits == "all" else (take(x, batch.predict) for x in (corrections, others))
        taken, instead = (row.states + move for move in moves)
        if edits == "all" or kept.keys:
            found[edits, "once"] = run_upper(model, frozen, row, taken), None
        if not kept.keys:
            found[edits, "both ways"] = run_upper_with_alternatives(model, frozen, row, taken, at_targets(row, instead))
    states, _, _ = model.apply({"params": frozen}, jnp.asarray(batch.tokens), every_position(), method="lower")
    moved, flipped = states + corrections, flip_each(batch.predict, states + corrections, states + others)
    for edits in ("targets", "all"):
        ways = jnp.concatenate([moved[None], flipped])
        hidden = run_by_turns(model, frozen, batch.tokens, corrected_positions(edits), ways)
        expected[edits] = take(hidden[0], batch.predict), take_each(hidden[1:], batch.predict)
    return found, expected


@pytest.mark.parametrize(
    ("key_heads", "scaling", "entry"),
    [
        (1, LINEAR, 0),
        (4, LLAMA3, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, LINEAR, 2), (2, None, 0), (2, None, 2), (4, LLAMA3, 0))
        ),
    ],
)
def test_upper_blocks_over_the_cached_prompt_are_one_whole_run_per_turn(key_heads, scaling, entry):
    config = dataclasses.replace(TINY, num_kv_heads=key_heads, rope_scaling=scaling)
    model, frozen, batch = Llama(config, (0,), entry=entry), make_backbone(config), make_rows(config.vocab_size)
    shape = jax.ShapeDtypeStruct((len(batch.tokens), LENGTH, config.hidden_size), jnp.float32)
    found, expected = compare(model, frozen, batch, random(shape, 7, 1.0), random(shape, 8, 1.0))
    real = batch.weights > 0
    assert sorted(found) == [(edits, by) for edits in ("all", "targets") for by in ("both ways", "once")]
    for (edits, by), outputs in found.items():
        for a, b in zip(outputs, expected[edits]):
            if a is not None:
                np.testing.assert_allclose(a[real], b[real], atol=1e-5, err_msg=f"{edits}, {by}")
                assert np.all(np.isfinite(a))
    whole, flipped = expected["targets"]
    assert np.abs(whole - flipped)[real].max() > 0.1
    assert np.abs(whole - expected["all"][0])[real].max() > 0.1
