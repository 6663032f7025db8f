"""Training of a side plugin, beside the frozen backbone."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import Batch
from spa_jax.models.llama import Llama, Params, Remat
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.pruning import prune
from spa_jax.training.config import TapCacheConfig
from spa_jax.training.features import Features, extract, kept_for
from spa_jax.training.objective import FOLDS, RouterConfig, summed_loss, token_outcomes
from spa_jax.training.outcomes import Outcomes, Sums
from spa_jax.training.recipe import Recipe
from spa_jax.training.sources import CachedFeatures, Source, open_tap_cache
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin


@dataclasses.dataclass(frozen=True)
class PluginRecipe(Recipe[Batch | Features, Batch | Features]):
    """A side network and its router, trained on features of the backbone.

    Attributes:
        method: the plugin.
        cached: whether to keep features in the tap cache, if they fit; else batches are tokens, and the backbone runs
            in every step.
        router: how the router learns; None where nothing is trained.
        seed: of the initial parameters.
        side_init: initial blocks of a transformer side network, random or pruned from the backbone's.
    """

    method: PluginConfig
    cached: bool
    router: RouterConfig | None = None
    seed: int = 0
    side_init: Literal["random", "pruned"] = "random"

    def model(self, backbone: Backbone) -> Llama:
        remat: Remat = "dots" if self.method.edits == "all" else "none"  # a gradient goes through all of a row
        return backbone.model(self.method.taps, remat, self.method.entry)

    def init_params(self, backbone: Backbone) -> Params:
        """Returns the plugin's parameters, and with cross-fitting in `folds` the stacked side networks of the folds."""
        assert self.router is not None, "nothing is trained"
        random_router = self.router.objective != "improvement"

        def init(seed: int) -> Params:
            params = init_plugin(self.method, seed, random_router=random_router)
            if self.side_init == "pruned":
                params["side"] = prune(self.method.side, backbone.config, backbone.params, params["side"])
            return params

        params = init(self.seed)
        if self.router.cross_fit:
            others = [init(self.seed + 1 + fold)["side"] for fold in range(FOLDS)]
            params["folds"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
        return params

    def method_params(self, params: Params) -> Params:
        return {name: leaves for name, leaves in params.items() if name != "folds"}

    def sources(
        self, backbone: Backbone, model: Llama, options: TapCacheConfig, batch_size: int, examples: Sequence[Example]
    ) -> tuple[Source, Source]:
        source = Source()
        if self.cached:
            cache = open_tap_cache(options, model, self.method, backbone, examples)
            if cache is not None:
                source = CachedFeatures(cache, model, backbone.params, batch_size)
        return source, source

    def features(self, model: Llama, frozen: Params, batch: Batch | Features) -> Features:
        """Returns the features of a batch, by a backbone pass over its tokens where they are not cached."""
        return extract(model, frozen, batch, kept_for(self.method)) if isinstance(batch, Batch) else batch

    def loss(
        self, model: Llama, params: Params, frozen: Params, batch: Batch | Features
    ) -> tuple[Float[Array, ""], Sums]:
        assert self.router is not None, "nothing is trained"
        features = self.features(model, frozen, batch)
        return summed_loss(params, frozen, features, plugin=self.method, router=self.router, model=model)

    def outcomes(
        self, model: Llama, params: Params, frozen: Params, batch: Batch | Features, threshold: Float[Array, ""]
    ) -> tuple[Outcomes, Float[Array, "B R"]]:
        features = self.features(model, frozen, batch)
        return token_outcomes(self.method, model, params, frozen, features, threshold), features.weights

    def trained(self, threshold: float, params: Params, backbone: Backbone, template: str, date: str = "") -> Plugin:
        method = dataclasses.replace(self.method, threshold=threshold)
        return Plugin(method, params, backbone.name, backbone.fingerprint, template, date)
