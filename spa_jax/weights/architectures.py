"""Backbone architectures without weights, for programs that are only compiled."""

from spa_jax.errors import UserError
from spa_jax.files import named_path, read_json
from spa_jax.models.block import LlamaConfig, RopeScaling
from spa_jax.weights.hf_config import llama_config_from_hf

LLAMA3 = RopeScaling("llama3", 8.0)

ARCHITECTURES = {
    "smollm2-135m-instruct": LlamaConfig(
        49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "llama-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
    "llama-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128),
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-3.1-8b": LlamaConfig(
        128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, rope_scaling=LLAMA3, rms_norm_eps=1e-5,
        max_position_embeddings=131072,
    ),
    "llama-3.1-70b": LlamaConfig(
        128256, 8192, 28672, 80, 64, 8, 128, rope_theta=5e5, rope_scaling=LLAMA3, rms_norm_eps=1e-5,
        max_position_embeddings=131072,
    ),
}  # fmt: skip
"""Architectures by the names of `registry.REGISTRY` and those of the paper's models."""


def architecture(name: str) -> LlamaConfig:
    """Looks up an architecture.

    Args:
        name: a key of `ARCHITECTURES`, or a directory with a `config.json` in Hugging Face's format.

    Raises:
        UserError: the name is neither.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    try:
        return llama_config_from_hf(read_json(named_path(name) / "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no architecture '{name}': give a directory with a config.json, or one of "
            f"{', '.join(ARCHITECTURES)}"
        ) from error
