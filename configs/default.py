"""Every key of a training run with its default; other configs start from this one.

    python -m spa_jax.train --config=configs/default.py --workdir=DIR --config.data.train=mine.jsonl

The values are in spa_jax/training/defaults.py. What each key means is said in docs/training.md, and in full in
spa_jax/training/config.py, optimizer.py, objective.py, sharding.py and processes.py, and in spa_jax/models/compute.py.
"""

import copy

from ml_collections import ConfigDict

from spa_jax.training.defaults import DEFAULTS


def get_config() -> ConfigDict:
    return ConfigDict(copy.deepcopy(DEFAULTS))
