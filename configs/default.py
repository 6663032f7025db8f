"""Every key of a training run with its default; other configs start from this one.

    python -m spa_jax.train --config=configs/default.py --workdir=DIR --config.data.train=mine.jsonl

What each key means is said in spa_jax/training/config.py, optimizer.py, objective.py, sharding.py
and processes.py, and in spa_jax/models/compute.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
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
    )
