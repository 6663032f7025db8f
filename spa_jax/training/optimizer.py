"""AdamW with warm-up, cosine decay and clipping by global norm."""

import dataclasses
import functools
import re
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`optimizer.*`

    Attributes:
        learning_rate: rate at the end of the warm-up.
        warmup_fraction: share of all steps over which the rate rises from 0.
        final_fraction: share of the learning rate at which the cosine ends.
        weight_decay: decoupled decay, of matrices and not of vectors.
        clip_norm: largest global norm of a gradient; 0 for no limit.
        beta1, beta2: decay rates of Adam's averages.
    """

    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    final_fraction: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999


WEIGHT_DECAY = {
    r"(side|folds)/(down|output|adapter_in|adapter_out)": True,
    r"(side|folds)/(gate|adapter_in_bias|adapter_out_bias|norm/scale)": False,
    r"(side|folds)/ladder/block/(attention/[qkvo]|mlp/(gate|up|down))/kernel": True,
    r"(side|folds)/ladder/(gate|block/(attention|mlp)_norm/scale)": False,
    r"router/kernel": True,
    r"router/offset": False,
    r"(attention|mlp|[qkvo]|gate|up|down)/[ab]": True,  # LoRA and Adapter
    r"(attention|mlp)/[ab]_bias": False,
    r"embed/embedding|lm_head/kernel|blocks/(attention/[qkvo]|mlp/(gate|up|down))/kernel": True,  # full fine-tuning
    r"norm/scale|blocks/((attention|mlp|attention/[qk])_norm/scale|(attention/[qkvo]|mlp/(gate|up|down))/bias)": False,
}
"""Parameter path -> whether weight decay applies: to matrices, and not to vectors."""


def decays(path: str) -> bool:
    """Tells whether weight decay applies to a parameter, by its slash-separated path.

    Raises:
        ValueError: the table does not know the parameter.
    """
    for pattern, decay in WEIGHT_DECAY.items():
        if re.fullmatch(pattern, path):
            return decay
    raise ValueError(f"no rule of {__name__} says whether the parameter '{path}' decays: add one")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step, for a run of so many steps."""
    warmup = max(1, round(config.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1), config.learning_rate * config.final_fraction
    )


@functools.cache
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the transformation for a run of so many steps; the same object for the same arguments, so that a step
    compiled for it is found again."""

    def mask(params: optax.Params) -> optax.Params:
        def decays_here(keys: tuple[Any, ...], _: jax.Array) -> bool:
            return decays("/".join(key.key for key in keys))

        return jax.tree_util.tree_map_with_path(decays_here, params)

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.adamw(
        schedule(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=mask
    )
    return optax.chain(clip, adam)
