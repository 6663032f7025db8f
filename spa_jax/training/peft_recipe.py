"""Training of a LoRA or Adapter, through the frozen backbone.

They change what the backbone computes, so nothing of it can be kept from one step to the next, except the loss of the
backbone alone. Shape letters: B rows of a batch, R target tokens of a row, D width.
"""

import dataclasses
import logging
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import Batch
from spa_jax.models.llama import Llama, Params, Remat
from spa_jax.models.peft import PeftConfig
from spa_jax.training.config import TapCacheConfig
from spa_jax.training.features import tap_positions
from spa_jax.training.outcomes import Outcomes, Sums, sum_tokens
from spa_jax.training.recipe import Recipe
from spa_jax.training.sources import ScoredBatch, ScoredTokens, Source
from spa_jax.training.vocabulary_loss import token_losses
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import PeftPlugin

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PeftRecipe(Recipe[Batch, ScoredBatch]):
    """A LoRA or Adapter, trained on tokens and measured on tokens with the base's loss.

    Attributes:
        method: the LoRA or Adapter.
        remat: what a block keeps of its forward pass for the gradient.
        seed: of the initial parameters.
    """

    method: PeftConfig
    remat: Remat = "none"
    seed: int = 0

    def model(self, backbone: Backbone) -> Llama:
        return backbone.model((), self.remat)

    def init_params(self, backbone: Backbone) -> Params:
        return self.method.init_params(backbone.config, self.seed)

    def sources(
        self, backbone: Backbone, model: Llama, options: TapCacheConfig, batch_size: int, examples: Sequence[Example]
    ) -> tuple[Source, Source]:
        log.info("'%s' trains through the backbone, which is run at every step: no tap cache", self.method.setting)
        return Source(), ScoredTokens(model, backbone.params, batch_size)

    def losses(self, model: Llama, params: Params, frozen: Params, batch: Batch) -> Float[Array, "B R"]:
        """Computes the cross-entropy of the target tokens in nats, by one pass through the adapted backbone."""
        positions, _ = tap_positions(batch, everywhere=True)
        adapter = self.method.block_adapter(params)
        out = model.apply({"params": frozen}, batch.tokens, positions, peft=adapter)
        hidden = jnp.take_along_axis(out.hidden, jnp.asarray(batch.predict)[:, :, None], axis=1)
        return token_losses(model, frozen, hidden, jnp.asarray(batch.targets))

    def loss(self, model: Llama, params: Params, frozen: Params, batch: Batch) -> tuple[Float[Array, ""], Sums]:
        losses = self.losses(model, params, frozen, batch)
        values = {"consulted": losses, "combined": losses, "usage": jnp.ones_like(losses)}
        sums = sum_tokens(values, jnp.asarray(batch.weights))
        return sums["consulted"], sums

    def outcomes(
        self, model: Llama, params: Params, frozen: Params, batch: ScoredBatch, threshold: Float[Array, ""]
    ) -> tuple[Outcomes, Float[Array, "B R"]]:
        """Computes the outcomes as those of a plugin that is always asked."""
        tokens, base_loss = batch
        losses, base = self.losses(model, params, frozen, tokens), jnp.asarray(base_loss)
        return Outcomes(base, losses, base, losses, jnp.ones_like(losses)), jnp.asarray(tokens.weights)

    def trained(
        self, threshold: float, params: Params, backbone: Backbone, template: str, date: str = ""
    ) -> PeftPlugin:
        return PeftPlugin(self.method, params, backbone.name, backbone.fingerprint, template, date)
