"""Trainings of other kinds with as many parameters as the token-wise side network."""

import dataclasses

from spa_jax.models.peft import METHODS, rank_for
from spa_jax.models.plugin import count_params, init_plugin
from spa_jax.training.config import RunConfig
from spa_jax.training.run import peft_config, plugin_config
from spa_jax.weights.backbone import Backbone

WIDEST = 256
"""The largest width of a side network that is tried."""


def plugin_size(config: RunConfig, backbone: Backbone) -> int:
    """Counts the trainable parameters of a run's plugin."""
    return count_params(init_plugin(plugin_config(config, backbone), abstract=True))


def with_size(config: RunConfig, backbone: Backbone, size: int) -> RunConfig:
    """Returns the config with the rank of LoRA, or the width of Adapter or side network, nearest to that size."""
    if config.setting in METHODS:
        peft = rank_for(peft_config(config), backbone.config, size)
        options = dataclasses.replace(config.peft, rank=peft.rank, alpha=peft.alpha, width=peft.rank)
        return dataclasses.replace(config, peft=options)
    step = 2 * config.side.heads if config.side.kind == "transformer" else 1
    widths = range(step, WIDEST + 1, step)
    candidates = [dataclasses.replace(config, side=dataclasses.replace(config.side, width=width)) for width in widths]
    return min(candidates, key=lambda candidate: abs(plugin_size(candidate, backbone) - size))
