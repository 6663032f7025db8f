"""What the side network changes, and whether the router finds the places: the paper's Table 4, as we read it.

Along the tokens a model generates greedily, with f the backbone's hidden state and f + g the one with the side network
(g alone in `s2` and `s3`):

- `effect/M`: exchanges per generated token, which is the share of tokens the device is asked for;
- `effect/diff_rate`: share of tokens where f + g would choose another token than f, in per cent;
- `effect/diff_pick_rate`: share of those for which the device was asked, in per cent.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import collate, plan_batches
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, Setting, with_correction
from spa_jax.models.llama import Params
from spa_jax.models.plugin import router_logits
from spa_jax.models.router import consult
from spa_jax.training.features import extract
from spa_jax.training.objective import corrections
from spa_jax.training.vocabulary_loss import best_tokens
from spa_jax.weights.plugin import Plugin


def side_effect(
    model: FusedModel, generated: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> dict[str, float]:
    """The three numbers over greedy generations.

    Args:
        model: that generated them.
        generated: prompt and new tokens of each.
        batch_size: rows that are run at once.

    Raises:
        UserError: the model has no side network.
    """
    plugin, setting = model.plugin, cast(Setting, model.setting)
    if not isinstance(plugin, Plugin) or setting == "base":
        raise UserError("without a side network there is no effect of it to measure: name a plugin")
    config, llama = plugin.config, model.model

    @jax.jit
    def step(params: Params, frozen: Params, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        features = extract(llama, frozen, batch, config.side.attends)
        f, g = features.hidden, corrections(config, params, features, llama)
        sigma = jnp.ones(f.shape[:2], bool)
        if setting in ROUTED:
            sigma = consult(router_logits(params, f), model.threshold)
        differs = best_tokens(llama, frozen, f) != best_tokens(llama, frozen, with_correction(setting, f, g))
        return sigma, differs, features.weights

    examples = [_example(*one) for one in generated]
    batches = [collate(examples, rows) for rows in plan_batches(examples, batch_size)]
    parts = [jax.device_get(step(plugin.params, model.backbone.params, batch)) for batch in batches]
    sigma, differs = (np.concatenate([part[i][part[2] > 0] for part in parts]) for i in (0, 1))
    return {
        "effect/M": float(sigma.mean()),
        "effect/diff_rate": 100 * float(differs.mean()),
        "effect/diff_pick_rate": 100 * float(sigma[differs].mean()) if differs.any() else 0.0,
    }


def alternatives(model: FusedModel, generated: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """What f alone would have chosen in the place of each generated token.

    Args:
        model: that generated them.
        generated: prompt and new tokens of each.
    """
    examples = [_example(*one) for one in generated]

    @jax.jit
    def step(frozen: Params, batch: Any) -> jax.Array:
        return best_tokens(model.model, frozen, extract(model.model, frozen, batch, everywhere=False).hidden)

    found = []
    for row, example in enumerate(examples):
        best = step(model.backbone.params, collate(examples, np.array([row])))
        found.append(np.asarray(best)[0, : len(example.predict)].tolist())
    return found


def _example(prompt: list[int], new: list[int]) -> Example:
    tokens = np.array([*prompt, *new[:-1]], np.int32)
    return Example(tokens, np.arange(len(prompt) - 1, len(tokens), dtype=np.int32), np.array(new, np.int32))
