"""LoRA and Adapter in training: their loss through the frozen backbone, where a plugin's is beside it.

They change what the backbone computes, so nothing of it can be kept from one step to the next, except the loss of the
backbone alone. Shape letters: B rows, R target tokens of a row, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import Batch, collate
from spa_jax.models.llama import Llama, Params
from spa_jax.models.peft import Peft, PeftConfig
from spa_jax.training.features import Features, where_read
from spa_jax.training.objective import Outcomes, Sums, sums
from spa_jax.training.vocabulary_loss import token_losses


class Scored(NamedTuple):
    """A batch and what the backbone alone makes of it."""

    batch: Batch
    base_loss: Float[np.ndarray, "B R"]
    """Nats, float32."""


def adapted_losses(peft: PeftConfig, model: Llama, params: Params, frozen: Params, batch: Batch) -> Float[Array, "B R"]:
    """Cross-entropy of the target tokens in nats, by one pass through the adapted backbone."""
    positions, _ = where_read(batch, everywhere=True)
    out = model.apply({"params": frozen}, batch.tokens, positions, peft=Peft(peft, params))
    hidden = jnp.take_along_axis(out.hidden, jnp.asarray(batch.predict)[:, :, None], axis=1)
    return token_losses(model, frozen, hidden, jnp.asarray(batch.targets))


def summed_adapted_loss(
    params: Params, frozen: Params, batch: Batch, *, peft: PeftConfig, model: Llama
) -> tuple[Float[Array, ""], Sums]:
    """What is minimised, summed over target tokens, and the sums to report; gradients reach `params` alone."""
    losses = adapted_losses(peft, model, params, frozen, batch)
    values = {"always": losses, "combined": losses, "usage": jnp.ones_like(losses)}
    summed = sums(values, jnp.asarray(batch.weights))
    return summed["always"], summed


def adapted_outcomes(peft: PeftConfig, model: Llama, params: Params, frozen: Params, scored: Scored) -> Outcomes:
    """As of a plugin that is always asked."""
    losses = adapted_losses(peft, model, params, frozen, scored.batch)
    base = jnp.asarray(scored.base_loss)
    return Outcomes(base, base, losses, jnp.ones_like(losses))


def scoring(
    features: Iterable[tuple[int, Features]],
) -> Callable[..., Scored]:
    """A `pipeline.collate` of the examples whose features these are, by index."""
    base = {index: np.asarray(of_row.base_loss) for index, of_row in features}

    def collate_scored(
        examples: Sequence[Example], rows: Int[np.ndarray, " B"], shape: tuple[int, int] | None = None
    ) -> Scored:
        batch = collate(examples, rows, shape)
        none = np.zeros_like(batch.weights[0])
        return Scored(batch, np.stack([base[int(row)] if row >= 0 else none for row in rows]))

    return collate_scored
