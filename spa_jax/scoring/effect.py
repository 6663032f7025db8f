"""The effect of the side network on generated tokens: the paper's Table 4, as we read it.

Along the tokens a model generates greedily, with f the backbone's state and f + g the one with the side network (g
alone in `s2` and `s3`); in front of an inner block, both after the history that the generation had:

- `effect/M`: exchanges per generated token, which is the share of tokens the device is asked for;
- `effect/diff_rate`: share of tokens where f + g would lead to another token than f, in per cent;
- `effect/diff_pick_rate`: share of those for which the device was asked, in per cent.
"""

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import Batch, collate, plan_batches
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, Setting
from spa_jax.models.llama import Llama, Params
from spa_jax.models.plugin import PluginConfig
from spa_jax.training.features import Kept, extract, kept_for
from spa_jax.training.objective import possible_states, run_with_and_without_device
from spa_jax.training.vocabulary_loss import best_tokens


def side_effect(
    model: FusedModel, generated: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> dict[str, float]:
    """Measures the three numbers over greedy generations.

    Args:
        model: the model that generated them.
        generated: prompt and new tokens of each.
        batch_size: rows that are run at once.

    Raises:
        UserError: the model has no side network.
    """
    plugin, setting = model.plugin, cast(Setting, model.setting)
    if plugin is None or plugin.config.side is None or setting == "base":
        raise UserError("without a side network there is no effect of it to measure: name a plugin")
    config, frozen = cast(PluginConfig, plugin.config), model.backbone.params
    examples = [_example(*one) for one in generated]
    batches = [collate(examples, rows) for rows in plan_batches(examples, batch_size)]
    results = [
        _consulted_and_changed(config, setting, model.model, plugin.params, frozen, model.threshold, batch)
        for batch in batches
    ]
    real = [batch.weights > 0 for batch in batches]
    sigma, differs = (
        np.concatenate([np.asarray(result[i])[tokens] for result, tokens in zip(results, real)]) for i in (0, 1)
    )
    return {
        "effect/M": float(sigma.mean()),
        "effect/diff_rate": 100 * float(differs.mean()),
        "effect/diff_pick_rate": 100 * float(sigma[differs].mean()) if differs.any() else 0.0,
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _consulted_and_changed(
    config: PluginConfig,
    setting: Setting,
    llama: Llama,
    params: Params,
    frozen: Params,
    threshold: float | jax.Array,
    batch: Batch,
) -> tuple[Bool[Array, "B R"], Bool[Array, "B R"]]:
    """Tells for each token whether the device is asked, and whether the side network changes the choice."""
    features = extract(llama, frozen, batch, kept_for(config))
    states = possible_states(config, llama, params, frozen, features)
    if setting not in ROUTED:
        states = states._replace(probability=jnp.ones_like(states.probability))
    sigma, asked, unasked = run_with_and_without_device(llama, frozen, states, threshold)
    return sigma, best_tokens(llama, frozen, asked) != best_tokens(llama, frozen, unasked)


def alternatives(model: FusedModel, generated: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Returns the tokens that f alone would have chosen in the place of each generated token.

    Args:
        model: the model that generated them.
        generated: prompt and new tokens of each.
    """
    examples = [_example(*one) for one in generated]
    found = []
    for row, example in enumerate(examples):
        best = _best_of_backbone(model.model, model.backbone.params, collate(examples, np.array([row])))
        found.append(np.asarray(best)[0, : len(example.predict)].tolist())
    return found


@functools.partial(jax.jit, static_argnums=0)
def _best_of_backbone(llama: Llama, frozen: Params, batch: Batch) -> Int[Array, "B R"]:
    return best_tokens(llama, frozen, extract(llama.clone(entry="head"), frozen, batch, Kept()).states)


def _example(prompt: list[int], new: list[int]) -> Example:
    tokens = np.array([*prompt, *new[:-1]], np.int32)
    return Example(tokens, np.arange(len(prompt) - 1, len(tokens), dtype=np.int32), np.array(new, np.int32))
