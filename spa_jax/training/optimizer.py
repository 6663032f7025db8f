"""AdamW with warm-up, cosine decay and clipping by global norm."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    learning_rate: at the end of the warm-up.
    warmup_fraction: of all steps, over which the rate rises from 0.
    final_fraction: of the learning rate, where the cosine ends.
    weight_decay: decoupled, on matrices and not on vectors.
    clip_norm: largest global norm of a gradient; 0 for no limit.
    beta1, beta2: Adam's averages.
    """

    learning_rate: float
    warmup_fraction: float
    final_fraction: float
    weight_decay: float
    clip_norm: float
    beta1: float
    beta2: float


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step."""
    warmup = max(1, round(config.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1), config.learning_rate * config.final_fraction
    )


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation for a run of `steps`."""

    def matrices(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(("bias", "gate", "scale")), params
        )

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.adamw(
        schedule(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=matrices
    )
    return optax.chain(clip, adam)
