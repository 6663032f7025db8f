"""Trainings of other kinds with as many parameters as the token-wise side network."""

import bisect
import dataclasses

from spa_jax.models.block import LlamaConfig
from spa_jax.models.peft import PEFT_SETTINGS, rank_for
from spa_jax.models.plugin import count_params
from spa_jax.training.config import RunConfig
from spa_jax.training.methods import peft_config, recipe_from_config

WIDEST = 256
"""The largest width of a side network that is tried."""


def trainable_size(config: RunConfig, backbone: LlamaConfig) -> int:
    """Counts the parameters of what a run trains."""
    return count_params(recipe_from_config(config, backbone).method.param_shapes(backbone))


def with_size(config: RunConfig, backbone: LlamaConfig, size: int) -> RunConfig:
    """Returns the config with the rank of LoRA, or the width of Adapter or side network, nearest to that size."""
    if config.setting in PEFT_SETTINGS:
        peft = rank_for(peft_config(config), backbone, size)
        options = dataclasses.replace(config.peft, rank=peft.rank, alpha=peft.alpha, width=peft.rank)
        return dataclasses.replace(config, peft=options)
    step = 2 * config.side.heads if config.side.kind == "transformer" else 1
    widths = range(step, WIDEST + 1, step)

    def at(width: int) -> RunConfig:
        return dataclasses.replace(config, side=dataclasses.replace(config.side, width=width))

    reached = bisect.bisect_left(widths, size, key=lambda width: trainable_size(at(width), backbone))
    nearest = widths[max(reached - 1, 0) : reached + 1]
    return min(map(at, nearest), key=lambda candidate: abs(trainable_size(candidate, backbone) - size))
