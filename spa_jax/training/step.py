"""One optimizer step as one jitted program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from spa_jax.models.llama import Llama, Params
from spa_jax.models.peft import PeftConfig
from spa_jax.models.plugin import PluginConfig
from spa_jax.training.features import Features, extract
from spa_jax.training.objective import Outcomes, RouterConfig, Sums, summed_loss, token_outcomes
from spa_jax.training.through import adapted_outcomes, summed_adapted_loss


class TrainState(NamedTuple):
    """All that changes during training; the frozen backbone is no part of it."""

    step: jax.Array
    """Optimizer steps taken, int32; the data position and the random state follow from it."""
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def features_of(plugin: PluginConfig, model: Llama, frozen: Params, batch: Any) -> Features:
    """The features of a batch: itself when they come from the tap cache, else one backbone pass over its tokens."""
    return batch if isinstance(batch, Features) else extract(model, frozen, batch, plugin.side.attends)


def make_train_step(
    plugin: PluginConfig | PeftConfig,
    router: RouterConfig,
    model: Llama,
    optimizer: optax.GradientTransformation,
    accumulate: int,
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Sums]]:
    """A jitted `(state, frozen, batch) -> (state, sums)`, compiled once per bucket; the state is donated.

    The batch, of B rows, is a `Batch`, or `Features` where a plugin is trained. It is worked through in `accumulate`
    parts of B / accumulate rows; the summed loss of all of them is divided by their summed target tokens, so the parts
    weigh by their tokens.
    """
    partitioner = model.partitioner

    def part(params: Params, frozen: Params, rows: Any) -> tuple[Params, Sums]:
        if isinstance(plugin, PeftConfig):
            through = functools.partial(summed_adapted_loss, peft=plugin, model=model)
            return jax.grad(through, has_aux=True)(params, frozen, rows)
        beside = functools.partial(summed_loss, plugin=plugin, router=router, model=model)
        return jax.grad(beside, has_aux=True)(params, frozen, features_of(plugin, model, frozen, rows))

    def train_step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Sums]:
        parts = jax.tree.map(lambda x: partitioner.constrain(x.reshape(accumulate, -1, *x.shape[1:]), ".B"), batch)
        whole = partitioner.gather(state.params)

        def add(total: Any, rows: Any) -> tuple[Any, None]:
            grads, sums = jax.tree.map(jnp.add, total, part(whole, frozen, rows))
            return (partitioner.constrain_params(grads), sums), None

        first = jax.eval_shape(part, state.params, frozen, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
        grads = jax.tree.map(lambda x: x / jnp.maximum(sums["tokens"], 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = partitioner.constrain_params(TrainState(state.step + 1, params, opt_state))
        return state, {**sums, "gradient_norm": optax.tree.norm(grads)}

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    plugin: PluginConfig | PeftConfig, model: Llama
) -> Callable[[Params, Params, Any], tuple[Outcomes, Float[Array, "B R"]]]:
    """A jitted `(params, frozen, batch) -> (token outcomes, weights)`; the batch is `Scored` where no plugin is
    evaluated."""
    partitioner = model.partitioner

    @jax.jit
    def eval_step(params: Params, frozen: Params, batch: Any) -> tuple[Outcomes, Float[Array, "B R"]]:
        if isinstance(plugin, PeftConfig):
            outcomes = adapted_outcomes(plugin, model, partitioner.gather(params), frozen, batch), batch.batch.weights
        else:
            features = features_of(plugin, model, frozen, batch)
            outcomes = token_outcomes(plugin, model, partitioner.gather(params), frozen, features), features.weights
        return jax.tree.map(
            lambda leaf: partitioner.constrain(leaf, ""), outcomes
        )  # whole, so that every process can read it

    return eval_step
