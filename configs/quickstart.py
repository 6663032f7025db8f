"""Train on the embedded persona: one invented person's life in 120 facts and 34 notes.

    python -m spa_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware, time and result: experiments/results/quickstart.json, made by `python -m experiments.benchmarks.quickstart`.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.side.entry = "head"
    config.side.width = 128
    config.train.epochs = 6
    config.optimizer.learning_rate = 3e-3
    config.router.margin = 0.5  # where the base gives up less, its likeliest token is the right one: exp(-0.5) > 1/2
    config.router.weighted = False
    config.router.budget = 0.88
    return config
