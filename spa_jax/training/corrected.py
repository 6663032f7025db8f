"""Corrected states on their way to a loss: through the blocks above the entry, and the LM head.

A plugin with an inner entry corrects the states of some positions in front of a block, and the frozen blocks from there
on go on from them. With `edits=targets` these are the R predicting positions of a row, which see the backbone's own
keys and values of the tokens before their answer, and corrected ones within it; with `edits=all` they are all T.

Shape letters: B rows, T tokens, R target tokens of a row, M corrected positions (R or T), D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.decoding.cache import init_cache
from spa_jax.models.block import PADDING, Cache, CachePlacement, place_by_position, prompt_positions
from spa_jax.models.llama import Llama, Params
from spa_jax.training.features import Features, blocks_above


class Row(NamedTuple):
    """The positions that are corrected, and what they see besides each other."""

    states: Float[Array, "B M D"]
    """Uncorrected."""
    positions: Int[Array, "B M"]
    """`PADDING` for padding."""
    answer_starts: Int[Array, "B M"]
    """The position from which on each sees corrected keys and values; the ones before are the backbone's own."""
    predicts: Int[Array, "B R"]
    """Index, among the M positions, of the one that predicts each target."""
    keys: Cache | None
    """The backbone's own keys and values; None where all are corrected."""


def corrected_row(model: Llama, frozen: Params, features: Features, everywhere: bool) -> Row:
    """Finds the positions to correct: all, or those that predict targets.

    The backbone's own keys and values are computed from the states of all positions where they are not kept.
    """
    answers, states = features.answers, features.states
    rows, targets = features.targets.shape
    in_order = jnp.broadcast_to(jnp.arange(targets, dtype=jnp.int32), (rows, targets))
    if answers is None:
        nowhere = jnp.zeros_like(in_order)
        return Row(states, nowhere, nowhere, in_order, None)
    if features.keys is not None:
        return Row(states, answers.predict, answers.answer_starts, in_order, features.keys)
    positions = prompt_positions(answers.lengths, states.shape[1])
    predicts = jnp.where(answers.predict == PADDING, 0, answers.predict)
    if everywhere:
        return Row(states, positions, jnp.zeros_like(positions), predicts, None)
    cache = init_cache(blocks_above(model), rows, states.shape[1], model.activation_dtype)
    places = place_by_position(positions, None)
    _, keys = model.apply({"params": frozen}, states, positions, cache, places, method="upper")
    own = jnp.take_along_axis(states, predicts[:, :, None], axis=1)
    return Row(own, answers.predict, answers.answer_starts, in_order, jax.lax.stop_gradient(keys))


def at_targets(row: Row, x: Array) -> Array:
    """Selects from `[B,M,...]` what stands at the positions that predict targets, `[B,R,...]`."""
    return jnp.take_along_axis(x, row.predicts.reshape(*row.predicts.shape, *[1] * (x.ndim - 2)), axis=1)


def run_upper(model: Llama, frozen: Params, row: Row, states: Float[Array, "B M D"]) -> Float[Array, "B R D"]:
    """Computes the LM head's input for each target when the states of a row are replaced by these."""
    if model.entry == "head":
        return states
    mask = _attention_mask(row, row.positions, row.answer_starts)
    return at_targets(row, _run(model, frozen, row, states, row.positions, mask))


def run_upper_with_alternatives(
    model: Llama, frozen: Params, row: Row, taken: Float[Array, "B M D"], others: Float[Array, "B R D"]
) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"]]:
    """Computes two inputs of the LM head for each target, in one pass: that of the states `taken`, and the one it would
    have if its own state alone were another.

    Beside each predicting position stands a second one with the other state, which sees the same history and itself,
    and is seen by nobody.
    """
    if model.entry == "head":
        return taken, others
    count = taken.shape[1]
    positions, answer_starts = at_targets(row, row.positions), at_targets(row, row.answer_starts)
    # A second position sees the taken ones strictly before it, so that its own place is left to itself.
    history = _attention_mask(row, positions - 1, answer_starts)
    own = _attention_mask(row, row.positions, row.answer_starts)
    room = jnp.zeros((len(taken), 1, count, others.shape[1]), bool)
    itself = jnp.broadcast_to(jnp.eye(others.shape[1], dtype=bool), (len(taken), 1, *[others.shape[1]] * 2))
    mask = jnp.concatenate([jnp.concatenate([own, room], axis=3), jnp.concatenate([history, itself], axis=3)], axis=2)
    hidden = _run(
        model,
        frozen,
        row,
        jnp.concatenate([taken, others], axis=1),
        jnp.concatenate([row.positions, positions], axis=1),
        mask,
    )
    return at_targets(row, hidden[:, :count]), hidden[:, count:]


def _attention_mask(row: Row, until: Int[Array, "B Q"], answer_starts: Int[Array, "B Q"]) -> Bool[Array, "B 1 Q S"]:
    """Tells which keys, first the backbone's own and then the row's corrected ones, queries see that look back to the
    position `until`, and whose answer starts at `answer_starts`."""
    until, answer_starts = until[:, None, :, None], answer_starts[:, None, :, None]
    positions = row.positions[:, None, None, :]
    corrected = (positions <= until) & (positions >= answer_starts)
    if row.keys is None:
        return corrected
    before = jnp.arange(row.keys["k"].shape[-1], dtype=jnp.int32)[None, None, None, :] < answer_starts
    return jnp.concatenate([before, corrected], axis=3)


def _run(
    model: Llama, frozen: Params, row: Row, states: jax.Array, positions: jax.Array, mask: jax.Array
) -> Float[Array, "B Q D"]:
    places = CachePlacement(positions, mask, reads_cache=False)
    hidden, _ = model.apply({"params": frozen}, states, positions, None, places, context=row.keys, method="upper")
    return hidden
