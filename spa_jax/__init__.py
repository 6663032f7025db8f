"""Side Plugin Adaption (SPA) in JAX: a frozen LLaMA in the cloud, a personal side plugin on the device.

Train a plugin on rows of your own, and ask it something:

    >>> import spa_jax
    >>> summary = spa_jax.train_plugin({"data.train": "mine.jsonl", "train.epochs": 2}, "runs/mine")
    >>> backbone = spa_jax.load_backbone("smollm2-135m-instruct")
    >>> plugin = spa_jax.load_plugin("runs/mine/plugin")
    >>> answer = spa_jax.generate_text(backbone, plugin, "What is thing 3?", max_new_tokens=8)
    >>> answer.text, answer.consulted_share  # doctest: +SKIP
    ('my dog', 1.0)

`Cloud` and `Device` are the same generation by two programs that share no parameter and meet only in messages; the
device's request is made by `spa_jax.split.request`. What the user can correct is raised as `UserError`.

The names are imported when they are first used: `import spa_jax` by itself loads neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa_jax.api import GeneratedText, evaluate_plugin, generate_text, load_plugin, train_plugin
    from spa_jax.errors import UserError
    from spa_jax.split.device import Device
    from spa_jax.split.session import Cloud
    from spa_jax.weights.registry import load_backbone

_MODULES = {
    "Cloud": "spa_jax.split.session",
    "Device": "spa_jax.split.device",
    "GeneratedText": "spa_jax.api",
    "UserError": "spa_jax.errors",
    "evaluate_plugin": "spa_jax.api",
    "generate_text": "spa_jax.api",
    "load_backbone": "spa_jax.weights.registry",
    "load_plugin": "spa_jax.api",
    "train_plugin": "spa_jax.api",
}
"""The module of each public name."""

__all__ = [
    "Cloud",
    "Device",
    "GeneratedText",
    "UserError",
    "evaluate_plugin",
    "generate_text",
    "load_backbone",
    "load_plugin",
    "train_plugin",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'spa_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
