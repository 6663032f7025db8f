"""The choice of what is trained, a plugin, a LoRA or an Adapter, and of how."""

from typing import cast

from spa_jax.models.block import LlamaConfig
from spa_jax.models.combine import Setting
from spa_jax.models.method import Method
from spa_jax.models.peft import PEFT_SETTINGS, PeftConfig
from spa_jax.models.plugin import PluginConfig, parse_entry, select_taps
from spa_jax.models.side import SideConfig
from spa_jax.training.config import RunConfig
from spa_jax.training.peft_recipe import PeftRecipe
from spa_jax.training.plugin_recipe import PluginRecipe
from spa_jax.training.recipe import Recipe


def plugin_config(config: RunConfig, backbone: LlamaConfig) -> PluginConfig:
    """Returns the plugin that a run of `spa`, `s1`, `s2` or `s3` trains.

    Raises:
        UserError: `side.entry` or `side.taps` are not those of this backbone.
    """
    options = config.side
    entry = parse_entry(options.entry, backbone)
    side = SideConfig(options.kind, options.width, select_taps(options.taps, backbone, entry), options.heads)
    edits = "targets" if entry == "head" else options.edits
    setting, router = cast(Setting, config.setting), config.router
    return PluginConfig(setting, side, backbone.hidden_size, router.threshold, router.offset, entry, edits)


def peft_config(config: RunConfig) -> PeftConfig:
    """Returns the LoRA or Adapter that a run of `lora` or `adapter` trains."""
    options = config.peft
    if config.setting == "lora":
        return PeftConfig("lora", options.rank, options.alpha, tuple(options.targets.split(",")))
    return PeftConfig("adapter", options.width)


def recipe_from_config(config: RunConfig, backbone: LlamaConfig) -> Recipe:
    """Returns what a run trains, and how.

    Raises:
        UserError: `side.entry` or `side.taps` are not those of this backbone.
    """
    if config.setting in PEFT_SETTINGS:
        return PeftRecipe(peft_config(config), config.peft.remat, config.seed)
    plugin = plugin_config(config, backbone)
    return PluginRecipe(plugin, config.tap_cache.enabled, config.router, config.seed, config.side.init)


def recipe_for(method: Method, cached: bool = True) -> Recipe:
    """Returns the recipe by which trained parameters of a method are measured; with `cached`, by way of the tap cache
    where the method can use it."""
    return PluginRecipe(method, cached) if isinstance(method, PluginConfig) else PeftRecipe(cast(PeftConfig, method))
