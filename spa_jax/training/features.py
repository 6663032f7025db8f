"""Features: everything of one frozen backbone pass that the training of a plugin reads.

Sigma, the consulted share and the loss live on the positions that predict target tokens. What else is kept follows from
where corrections enter: in front of the LM head, nothing; in front of an inner block, what the blocks above need to go
on from corrected states. Shape letters: B rows, T tokens, R target tokens of a row, S positions with taps, M with
states, P taps, D width, L' blocks above the entry.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spa_jax.data.pipeline import Batch
from spa_jax.decoding.cache import init_cache
from spa_jax.models.block import PADDING, Cache, LlamaConfig, place_by_position
from spa_jax.models.llama import Entry, Llama, Params, normalize_taps
from spa_jax.models.plugin import PluginConfig
from spa_jax.training.vocabulary_loss import token_losses


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which features are kept of a row.

    Attributes:
        taps_everywhere: taps at all T tokens, for a side network that attends or corrects the prompt too; else at the R
            predicting ones.
        states_everywhere: states at all T tokens; else at the R predicting ones.
        keys: keys and values of the blocks above the entry.
    """

    taps_everywhere: bool = False
    states_everywhere: bool = False
    keys: bool = False


AT_TARGETS = Kept()
"""States and taps at the predicting positions alone."""


def kept_for(plugin: PluginConfig, keys: bool = True) -> Kept:
    """Returns what the training of a plugin reads.

    Args:
        plugin: its shape.
        keys: for corrections at the predicting positions of an inner entry, whether to keep the prompt's keys and
            values of the blocks above; else the states are kept from which they can be made again.
    """
    if plugin.entry == "head":
        return Kept(plugin.side.attends)
    if plugin.edits == "all":
        return Kept(taps_everywhere=True, states_everywhere=True)
    return Kept(plugin.side.attends, states_everywhere=not keys, keys=keys)


class Answers(NamedTuple):
    """Where the answers of a row are, for the blocks above an inner entry."""

    predict: Int[Array, "B R"]
    """Positions that predict target tokens, `PADDING` for padding."""
    answer_starts: Int[Array, "B R"]
    """The first predicting position of the answer that each is in."""
    lengths: Int[Array, " B"]
    """Tokens of each row."""


class Features(NamedTuple):
    """The frozen backbone's outputs that a step reads; NumPy arrays from the tap cache."""

    states: Float[Array, "B M D"]
    """The state at the entry: f at `head`, or h_e in front of block e; in the dtype of activations."""
    taps: Float[Array, "B P S D"]
    """Normalised taps at the S positions that the side network reads, in the dtype of activations. The batch is first,
    so that every leaf splits by it."""
    base_loss: Float[Array, "B R"]
    """Cross-entropy of the backbone alone in nats, float32."""
    targets: Int[Array, "B R"]
    weights: Float[Array, "B R"]
    """1 for a target token, 0 for padding; float32."""
    positions: Int[Array, "B S"]
    """Positions of the taps, `PADDING` for padding."""
    reads: Int[Array, "B R"]
    """Index, among the S taps of a row, of the one that predicts each target."""
    answers: Answers | None = None
    """None at `head`."""
    keys: Cache | None = None
    """The backbone's own keys and values `[B,L',K,H,T]` of the blocks above the entry, where they are kept."""


class Prefix(NamedTuple):
    """The backbone's state after C tokens that all rows of some data begin with, such as a chat's system prompt."""

    cache: Cache
    """`[1,L,K,H,C]`."""
    states: Float[Array, "1 C D"]
    taps: Float[Array, "P 1 C D"]


def run_prefix(model: Llama, params: Params, tokens: Int[Array, "1 C"]) -> Prefix:
    """Runs the backbone over the common tokens once."""
    length = tokens.shape[1]
    apply, positions = functools.partial(model.apply, {"params": params}), jnp.arange(length, dtype=jnp.int32)[None, :]
    cache = init_cache(model.config, 1, length, model.activation_dtype)
    states, taps, cache = apply(tokens, positions, cache, method="lower")
    _, cache = apply(states, positions, cache, method="upper")
    return Prefix(cache, states, taps)


def extract(
    model: Llama,
    params: Params,
    batch: Batch,
    kept: Kept,
    prefix: Prefix | None = None,
    keys_dtype: DTypeLike | None = None,
) -> Features:
    """Runs the backbone over a batch of tokens.

    Args:
        model: the backbone's program.
        params: its parameters.
        batch: tokens and targets.
        kept: which features to keep.
        prefix: where given, only the tokens after it are run; no target may be predicted within it.
        keys_dtype: dtype of the keys and values that are kept; by default that of activations.
    """
    row_positions, _ = tap_positions(batch, everywhere=True)
    tokens, positions, predict = map(jnp.asarray, (batch.tokens, row_positions, batch.predict))
    rows, length = tokens.shape
    cache, places, start = None, None, 0
    if prefix is not None:
        start = prefix.taps.shape[2]
        room = ((0, 0), (0, 0), (0, 0), (0, 0), (0, length - start))
        cache = jax.tree.map(lambda leaf: jnp.pad(jnp.repeat(leaf, rows, axis=0), room), prefix.cache)
    apply, positions = functools.partial(model.apply, {"params": params}), positions[:, start:]
    states, taps, cache = apply(tokens[:, start:], positions, cache, method="lower")
    if prefix is None and kept.keys:
        cache, places = (
            init_cache(blocks_above(model), rows, length, model.activation_dtype),
            place_by_position(positions, None),
        )
    hidden, cache = apply(states, positions, cache, places, method="upper")
    predict_after_prefix = jnp.maximum(predict - start, 0)

    def keep(x: jax.Array, everywhere: bool, before: jax.Array | None) -> jax.Array:
        if not everywhere:
            return jnp.take_along_axis(x, predict_after_prefix[..., None][(None,) * (x.ndim - 3)], axis=-2)
        return x if before is None else jnp.concatenate([jnp.repeat(before, rows, axis=-3), x], axis=-2)

    hidden = keep(hidden, False, None)
    states = keep(states, kept.states_everywhere, None if prefix is None else prefix.states)
    taps = keep(taps, kept.taps_everywhere, None if prefix is None else prefix.taps)
    taps = jnp.moveaxis(normalize_taps(params, model.config, model.taps, taps), 0, 1)
    base_loss = token_losses(model, params, hidden, jnp.asarray(batch.targets))
    features = with_positions(batch, kept, model.entry, states, taps, base_loss)
    if kept.keys:
        above = blocks_above(model).num_layers
        keys = jax.tree.map(lambda leaf: leaf[:, -above:].astype(keys_dtype or model.activation_dtype), cache)
        features = features._replace(keys=keys)
    features = jax.tree.map(lambda leaf: model.partitioner.constrain(jnp.asarray(leaf), "B"), features)
    return jax.lax.stop_gradient(features)


def blocks_above(model: Llama) -> LlamaConfig:
    """Returns the architecture of the blocks above the entry alone, which a cache of their keys and values has."""
    assert model.entry != "head", "there are none"
    return dataclasses.replace(model.config, num_layers=model.config.num_layers - model.entry)


def with_positions(batch: Batch, kept: Kept, entry: Entry, states: Any, taps: Any, base_loss: Any) -> Features:
    """Assembles features, all but the keys, from arrays and the positions of a batch, of NumPy or traced arrays."""
    positions, reads = tap_positions(batch, kept.taps_everywhere)
    answers = None if entry == "head" else find_answers(batch)
    leaves: list[Any] = [states, taps, base_loss, batch.targets, batch.weights, positions, reads, answers]
    return Features(*leaves)


def tap_positions(
    batch: Batch, everywhere: bool
) -> tuple[Int[Array | np.ndarray, "B S"], Int[Array | np.ndarray, "B R"]]:
    """Returns `Features.positions` and `Features.reads` for a batch of NumPy or traced arrays."""
    xp = np if isinstance(batch.predict, np.ndarray) else jnp
    if not everywhere:
        return batch.predict, xp.broadcast_to(xp.arange(batch.predict.shape[1], dtype=xp.int32), batch.predict.shape)
    positions = xp.arange(batch.tokens.shape[1], dtype=xp.int32)[None, :]
    return xp.where(positions < batch.lengths[:, None], positions, PADDING), batch.predict


def find_answers(batch: Batch) -> Answers:
    """Finds the answers of each row, for a batch of NumPy or traced arrays: an answer is predicted by neighbouring
    positions."""
    xp = np if isinstance(batch.predict, np.ndarray) else jnp
    predict = batch.predict
    before = xp.concatenate([xp.full_like(predict[:, :1], -2), predict[:, :-1]], axis=1)
    answer_starts = xp.where(predict == before + 1, 0, predict)
    answer_starts = np.maximum.accumulate(answer_starts, axis=1) if xp is np else jax.lax.cummax(answer_starts, axis=1)
    real = batch.weights > 0
    leaves: list[Any] = [xp.where(real, predict, PADDING), xp.where(real, answer_starts, PADDING), batch.lengths]
    return Answers(*leaves)
