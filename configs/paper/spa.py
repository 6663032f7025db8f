"""The config that the paper's four runs share (section 4.2).

The paper takes the best learning rate of 2e-4, 5e-4 and 1e-3 on validation data:

    python -m spa_jax.train --config=configs/paper/xsum.py --workdir=DIR --config.optimizer.learning_rate=5e-4
"""

from ml_collections import ConfigDict

from configs import default

BACKBONE = "llama-2-7b"


def get_config(task: str = "xsum", backbone: str = BACKBONE) -> ConfigDict:
    config = default.get_config()
    config.backbone = backbone
    config.dtype = "bfloat16"
    config.data.task = task
    config.data.eval_size = 2_000
    config.train.epochs = 15
    config.train.batch_size = 8
    config.optimizer.learning_rate = 5e-4
    config.tap_cache.limit_gib = 400.0
    return config
