"""Features: everything of one frozen backbone pass that the training of a plugin reads.

Sigma, the consulted share and the loss live on the positions that predict target tokens, and so does everything here.
Shape letters: B rows, R target tokens of a row, P taps, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spa_jax.data.pipeline import Batch
from spa_jax.decoding.cache import init_cache
from spa_jax.models.block import PADDING, Cache
from spa_jax.models.llama import Llama, Params, normalize_taps
from spa_jax.training.vocabulary_loss import token_losses


class Features(NamedTuple):
    """The frozen backbone's outputs at the positions that predict targets; NumPy arrays from the tap cache."""

    hidden: Float[Array, "B R D"]
    """f, in front of the LM head; in the compute dtype."""
    taps: Float[Array, "B P S D"]
    """Normalised taps at the S positions that the side network reads, in the compute dtype: the R predicting ones for
    a token-wise side network, all T for one that attends. The batch is first, so that every leaf splits by it."""
    base_loss: Float[Array, "B R"]
    """Cross-entropy of f alone in nats, float32."""
    targets: Int[Array, "B R"]
    weights: Float[Array, "B R"]
    """1 for a target token, 0 for padding; float32."""
    positions: Int[Array, "B S"]
    """Positions of the taps, `PADDING` for padding."""
    reads: Int[Array, "B R"]
    """Index, among the S taps of a row, of the one that predicts each target."""


class Prefix(NamedTuple):
    """The backbone's state after C tokens that all rows of some data begin with, such as a chat's system prompt."""

    cache: Cache
    """`[1,L,K,H,C]`."""
    taps: Float[Array, "P 1 C D"]


def run_prefix(model: Llama, params: Params, tokens: Int[Array, "1 C"]) -> Prefix:
    """Runs the backbone over the common tokens once."""
    length = tokens.shape[1]
    cache = init_cache(model.config, 1, length, model.dtype)
    out = model.apply({"params": params}, tokens, jnp.arange(length, dtype=jnp.int32)[None, :], cache)
    return Prefix(out.cache, out.taps)


def extract(model: Llama, params: Params, batch: Batch, everywhere: bool, prefix: Prefix | None = None) -> Features:
    """Runs the backbone over a batch of tokens.

    Args:
        model: the backbone's program.
        params: its parameters.
        batch: tokens and targets.
        everywhere: whether to keep taps at all tokens, or only where targets are predicted.
        prefix: where given, only the tokens after it are run; no target may be predicted within it.
    """
    all_positions, _ = tap_positions(batch, everywhere=True)
    tokens, positions, predict = map(jnp.asarray, (batch.tokens, all_positions, batch.predict))
    rows, length = tokens.shape
    cache, start = None, 0
    if prefix is not None:
        start = prefix.taps.shape[2]
        room = ((0, 0), (0, 0), (0, 0), (0, 0), (0, length - start))
        cache = jax.tree.map(lambda leaf: jnp.pad(jnp.repeat(leaf, rows, axis=0), room), prefix.cache)
    out = model.apply({"params": params}, tokens[:, start:], positions[:, start:], cache)
    predict_after_prefix = jnp.maximum(predict - start, 0)
    hidden = jnp.take_along_axis(out.hidden, predict_after_prefix[:, :, None], axis=1)
    if not everywhere:
        taps = jnp.take_along_axis(out.taps, predict_after_prefix[None, :, :, None], axis=2)
    elif prefix is None:
        taps = out.taps
    else:
        taps = jnp.concatenate([jnp.repeat(prefix.taps, rows, axis=1), out.taps], axis=2)
    taps = jnp.moveaxis(normalize_taps(params, model.config, model.taps, taps), 0, 1)
    targets = jnp.asarray(batch.targets)
    base_loss = token_losses(model, params, hidden, targets)
    read_at, reads = map(jnp.asarray, tap_positions(batch, everywhere))
    features = Features(hidden, taps, base_loss, targets, jnp.asarray(batch.weights), read_at, reads)
    return jax.lax.stop_gradient(jax.tree.map(lambda leaf: model.partitioner.constrain(leaf, "B"), features))


def tap_positions(
    batch: Batch, everywhere: bool
) -> tuple[Int[Array | np.ndarray, "B S"], Int[Array | np.ndarray, "B R"]]:
    """Returns `Features.positions` and `Features.reads` for a batch of NumPy or traced arrays."""
    xp = np if isinstance(batch.predict, np.ndarray) else jnp
    if not everywhere:
        return batch.predict, xp.broadcast_to(xp.arange(batch.predict.shape[1], dtype=xp.int32), batch.predict.shape)
    positions = xp.arange(batch.tokens.shape[1], dtype=xp.int32)[None, :]
    return xp.where(positions < batch.lengths[:, None], positions, PADDING), batch.predict
