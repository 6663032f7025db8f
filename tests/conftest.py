"""Settings of every test, the tiny models they share, and the real backbone."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


import jax
import pytest

from spa_jax.errors import UserError
from spa_jax.models.llama import LlamaConfig, init_params
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

TINY = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    """Three blocks, D 32, two query heads to a key head."""
    return TINY


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Random parameters with norm weights away from 1, so that a norm left out shows."""
    params = init_params(tiny_config, seed=1)
    keys = iter(jax.random.split(jax.random.key(2), 100))

    def perturb(path, leaf):
        return leaf + 0.2 * jax.random.normal(next(keys), leaf.shape) if path[-1].key == "scale" else leaf

    return jax.tree_util.tree_map_with_path(perturb, params)


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """The real SmolLM2-135M-Instruct in float32."""
    try:
        return load_backbone("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
