"""Train on your own rows, a few hundred of them.

    python -m spa_jax.train --config=configs/own.py --workdir=runs/mine --config.data.train=mine.jsonl

What it changes of the defaults was chosen by held-out losses: docs/training.md, "Your own data".
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.train.epochs = 6  # of which the best state counts
    config.optimizer.learning_rate = 2e-3
    config.router.labels = "always"
    config.router.budget = 0.75
    return config
