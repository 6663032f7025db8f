"""One backbone pass over a batch: what the trainable half needs to know of it.

Sigma, the consulted share and the loss live on the positions that predict target tokens, and so does everything here.
Shape letters: B rows, R target tokens of a row, P taps, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spa_jax.data.pipeline import Batch
from spa_jax.models.llama import Llama, Params, normalize_taps, positions_from_mask
from spa_jax.training.vocabulary_loss import token_losses


class Features(NamedTuple):
    """The frozen backbone's outputs where targets are predicted; NumPy arrays when they come from the tap cache."""

    hidden: Float[Array, "B R D"]
    """f, in front of the LM head; in the compute dtype."""
    taps: Float[Array, "B P R D"]
    """Normalised taps, in the compute dtype; the batch first, so that every leaf splits by its first axis."""
    base_loss: Float[Array, "B R"]
    """Cross-entropy of f alone in nats, float32."""
    targets: Int[Array, "B R"]
    weights: Float[Array, "B R"]
    """1 for a target token, 0 for padding; float32."""


def extract(model: Llama, params: Params, batch: Batch) -> Features:
    """Runs the backbone over the batch's tokens and keeps the positions that predict targets."""
    length = batch.tokens.shape[1]
    mask = jnp.arange(length)[None, :] < batch.lengths[:, None]
    out = model.apply({"params": params}, batch.tokens, positions_from_mask(mask))
    hidden = jnp.take_along_axis(out.hidden, batch.predict[:, :, None], axis=1)
    taps = jnp.take_along_axis(out.taps, batch.predict[None, :, :, None], axis=2)
    taps = normalize_taps(params, model.config, model.taps, taps)
    targets = jnp.asarray(batch.targets)
    base_loss = token_losses(model, params, hidden, targets)
    features = Features(hidden, jnp.moveaxis(taps, 0, 1), base_loss, targets, jnp.asarray(batch.weights))
    return jax.lax.stop_gradient(features)
