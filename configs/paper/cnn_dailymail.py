"""CNN/DailyMail 3.0.0 as the paper trains it: SPA, 15 epochs, batch 8, on LLaMA-2-7B where the paper has LLaMA-7B.

    python -m spa_jax.train --config=configs/paper/cnn_dailymail.py --workdir=DIR

Another backbone: --config=configs/paper/cnn_dailymail.py:smollm2-135m-instruct. Table 5's smaller sizes:
--config.data.size=small or medium. Whether it fits a TPU that is not there: python -m spa_jax.aot, with the same flag.

On 8 chips of TPU v5e about 2 hours and 20 dollars (never run; an estimate): 35,890 batches once through the backbone,
0.13 s each where the compiler counts at least 0.07 s of operations and exchanges come on top, and 538,350 steps from
the tap cache, 5 ms assumed; 1.2 dollars a chip-hour. The cache takes about 1150 GiB; without it
(--config.tap_cache.enabled=False) the backbone runs at every step: about 20 hours and 190 dollars.
"""

from ml_collections import ConfigDict

from configs.paper import spa


def get_config(backbone: str = spa.BACKBONE) -> ConfigDict:
    config = spa.get_config("cnn_dailymail", backbone)
    config.tap_cache.limit_gib = 1300.0
    return config
