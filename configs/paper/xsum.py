"""XSum as the paper trains it: SPA, 15 epochs, batch 8, on LLaMA-2-7B where the paper has LLaMA-7B.

    python -m spa_jax.train --config=configs/paper/xsum.py --workdir=DIR

Another backbone: --config=configs/paper/xsum.py:smollm2-135m-instruct. Table 5's smaller sizes:
--config.data.size=small or medium. Whether it fits a TPU that is not there: python -m spa_jax.aot, with the same flag.

On 8 chips of TPU v5e about 1.3 hours and 12 dollars (never run; an estimate): 25,506 batches once through the
backbone, 0.1 s each where the compiler counts at least 0.05 s of operations and exchanges come on top, and 382,590
steps from the tap cache, 5 ms assumed; 1.2 dollars a chip-hour. The cache takes about 330 GiB.
"""

from ml_collections import ConfigDict

from configs.paper import spa


def get_config(backbone: str = spa.BACKBONE) -> ConfigDict:
    return spa.get_config("xsum", backbone)
