"""SPA on LLaMA-7B, the paper's backbone: 8 rows of 1024 tokens on 8 chips, all of which share one copy of it.

python -m spa_jax.aot --config=configs/paper/llama_7b.py --topology=v5e:2x4
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "backbone": "llama-7b",
            "dtype": "bfloat16",
            "train.batch_size": 8,
            "data.max_length": 1024,
            "tap_cache.enabled": False,
            "mesh.fsdp": 8,
        }
    )
    return config
