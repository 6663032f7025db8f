"""SciQ as the paper trains it: SPA on LLaMA-7B, 15 epochs, batch 8.

    python -m spa_jax.train --config=configs/paper/sciq.py --workdir=DIR

Another backbone: --config=configs/paper/sciq.py:smollm2-135m-instruct. Table 5's smaller sizes:
--config.data.size=small or medium. What a chip that isn't there makes of it: python -m spa_jax.aot, with the same flag.
"""

from ml_collections import ConfigDict

from configs.paper import spa


def get_config(backbone: str = spa.BACKBONE) -> ConfigDict:
    return spa.get_config("sciq", backbone)
