"""CoQA as the paper trains it: SPA, 15 epochs, batch 8, on LLaMA-2-7B where the paper has LLaMA-7B.

    python -m spa_jax.train --config=configs/paper/coqa.py --workdir=DIR

Another backbone: --config=configs/paper/coqa.py:smollm2-135m-instruct. Table 5's smaller sizes:
--config.data.size=small or medium. Whether it fits a TPU that is not there: python -m spa_jax.aot, with the same flag.

On 8 chips of TPU v5e about 10 minutes and 2 dollars, mostly to load and compile (never run; an estimate): 900 batches
once through the backbone, 0.15 s each where the compiler counts at least 0.07 s of operations and exchanges come on
top, and 13,500 steps from the tap cache; 1.2 dollars a chip-hour. The cache takes about 25 GiB.
"""

from ml_collections import ConfigDict

from configs.paper import spa


def get_config(backbone: str = spa.BACKBONE) -> ConfigDict:
    return spa.get_config("coqa", backbone)
