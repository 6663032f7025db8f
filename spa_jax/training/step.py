"""One optimizer step, and one evaluation step, each as one jitted program."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from spa_jax.models.llama import Llama, Params
from spa_jax.training.outcomes import Outcomes, Sums
from spa_jax.training.recipe import Recipe, ScoringBatch, TrainingBatch


class TrainState(NamedTuple):
    """All that changes during training; the frozen backbone is no part of it."""

    step: Int[Array, ""]
    """Optimizer steps taken, int32; the data position and the random state follow from it."""
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def train_step(
    recipe: Recipe[TrainingBatch, Any],
    model: Llama,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    frozen: Params,
    batch: TrainingBatch,
) -> tuple[TrainState, Sums]:
    """Takes one optimizer step on the mean loss of a batch's target tokens; compiled once per padded shape.

    Args:
        recipe: gives the loss.
        model: the backbone's program.
        optimizer: of `spa_jax.training.optimizer`.
        accumulate: parts of B / accumulate rows that the batch is worked through in. The summed loss of all parts is
            divided by their summed target tokens, so the parts weigh by their tokens.
        state: donated.
        frozen: the backbone.
        batch: B rows of the recipe's training source, a pytree with the rows first.

    Returns:
        The state, and sums over target tokens with the norm of the gradient.
    """
    partitioner = model.partitioner
    parts = jax.tree.map(lambda x: partitioner.constrain(x.reshape(accumulate, -1, *x.shape[1:]), ".B"), batch)
    gathered = partitioner.gather(state.params)

    def gradient(rows: Any) -> tuple[Params, Sums]:
        return jax.grad(lambda params: recipe.loss(model, params, frozen, rows), has_aux=True)(gathered)

    def add(total: Any, rows: Any) -> tuple[Any, None]:
        grads, sums = jax.tree.map(jnp.add, total, gradient(rows))
        return (partitioner.constrain_params(grads), sums), None

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda x: x / jnp.maximum(sums["tokens"], 1), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = partitioner.constrain_params(TrainState(state.step + 1, params, opt_state))
    return state, {**sums, "gradient_norm": optax.tree.norm(grads)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def eval_step(
    recipe: Recipe[Any, ScoringBatch],
    model: Llama,
    params: Params,
    frozen: Params,
    batch: ScoringBatch,
    threshold: Float[Array, ""],
) -> tuple[Outcomes, Float[Array, "B R"]]:
    """Computes the outcomes of a batch's target tokens and their weights, whole on every device, so that every process
    can read them; the batch is one of the recipe's scoring source."""
    partitioner = model.partitioner
    outcomes = recipe.outcomes(model, partitioner.gather(params), frozen, batch, threshold)
    return jax.tree.map(lambda leaf: partitioner.constrain(leaf, ""), outcomes)
