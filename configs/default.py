"""Every key of a training run with its default; other configs start from this one.

    python -m spa_jax.train --config=configs/default.py --workdir=DIR --config.data.train=mine.jsonl

The values are those of `RunConfig` in spa_jax/training/config.py; docs/training.md says what each key means.
"""

from ml_collections import ConfigDict

from spa_jax.training.config import default_config


def get_config() -> ConfigDict:
    return ConfigDict(default_config())
