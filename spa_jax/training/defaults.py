"""The default of every config key, from which `configs/default.py` and `spa_jax.train_plugin` start."""

import copy
from collections.abc import Mapping
from typing import Any

from spa_jax.errors import UserError
from spa_jax.training.config import RunConfig, parse

DEFAULTS: dict[str, Any] = {
    "backbone": "smollm2-135m-instruct",
    "dtype": "float32",
    "setting": "spa",
    "seed": 0,
    "side": {"kind": "tokenwise", "width": 32, "taps": "every:6", "heads": 4, "init": "random"},
    "router": {
        "objective": "improvement",
        "margin": 0.5,
        "weighted": True,
        "cross_fit": False,
        "offset": False,
        "threshold": 0.5,
        "budget": 0.0,
    },
    "peft": {"rank": 24, "alpha": 48.0, "targets": "q,v", "width": 48, "remat": "full"},
    "data": {
        "task": "",
        "directory": "",
        "size": "full",
        "eval_size": 0,
        "train": "",
        "eval": "",
        "eval_fraction": 0.1,
        "template": "auto",
        "max_length": 0,
        "phrasings": 0,
        "persona_seed": 0,
    },
    "train": {"epochs": 15, "batch_size": 8, "accumulate": 1, "log_every": 20, "eval_every": 0},
    "optimizer": {
        "learning_rate": 1e-3,
        "warmup_fraction": 0.05,
        "final_fraction": 0.1,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "beta1": 0.9,
        "beta2": 0.999,
    },
    "tap_cache": {"enabled": True, "directory": "", "limit_gib": 20.0},
    "compute": {"attention": "auto", "unroll": 1, "weights": "float"},
    "mesh": {"data": -1, "fsdp": -1, "tensor": -1, "slices": -1},
    "distributed": {
        "enabled": False,
        "coordinator": "",
        "processes": 0,
        "process": -1,
        "heartbeat_seconds": 100,
    },
}
"""Keys as `spa_jax.training.config.RunConfig` describes them."""


def with_defaults(keys: Mapping[str, Any]) -> RunConfig:
    """Returns the config of a run that sets some keys and leaves the others at their defaults.

    Args:
        keys: dotted keys such as `{"train.epochs": 6}`, or nested mappings such as `{"train": {"epochs": 6}}`.

    Raises:
        UserError: an unknown key, or a value that is of the wrong type or out of range.
    """
    config = copy.deepcopy(DEFAULTS)
    for name, value in keys.items():
        *path, last = name.split(".")
        group = config
        for part in path:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise UserError(f"unknown config key {name}: '{part}' has no keys of its own")
        merge = isinstance(value, Mapping) and isinstance(group.get(last), dict)
        group[last] = {**group[last], **value} if merge else value
    return parse(config)
