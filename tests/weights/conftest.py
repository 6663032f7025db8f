"""Tiny random LLaMAs in PyTorch, the independent judge of everything here."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spa_jax.models.llama import Llama
from spa_jax.weights.backbone import Backbone

TINY = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Makes tiny models of transformers, by `kind` a Llama, Mistral, Qwen2 or Qwen3.

    Norm scales and biases are random, or no test would see them.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(seed: int = 0, kind: str = "Llama", **overrides: Any) -> Any:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**{**TINY, **overrides})
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def save_tokenizer() -> Callable[[pathlib.Path], None]:
    """Writes a byte tokenizer with an EOS token into a directory."""
    from transformers import PreTrainedTokenizerFast

    def save(directory: pathlib.Path) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["</s>"])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)

    return save


@pytest.fixture
def save_model(make_model, save_tokenizer, tmp_path) -> Callable[..., tuple[Any, pathlib.Path]]:
    """Saves a tiny model with a tokenizer; keyword arguments starting with `save_` go to `save_pretrained`."""

    def save(**overrides: Any) -> tuple[Any, pathlib.Path]:
        saving = {key.removeprefix("save_"): overrides.pop(key) for key in list(overrides) if key.startswith("save_")}
        directory = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        model = make_model(**overrides)
        model.save_pretrained(directory, **saving)
        save_tokenizer(directory)
        return model, directory

    return save


@pytest.fixture
def assert_same_logits() -> Callable[[Backbone, Any], None]:
    """Compares spa_jax and transformers on the same tokens, at 1e-4."""

    def check(backbone: Backbone, model: Any) -> None:
        import torch

        tokens = np.random.default_rng(0).integers(0, backbone.config.vocab_size, (2, 13)).astype(np.int32)
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens).long()).logits.float().numpy()
        llama = Llama(backbone.config)

        @jax.jit
        def forward(variables: Any, tokens: np.ndarray) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
            return llama.apply(variables, llama.apply(variables, tokens, positions).hidden, method="logits")

        logits = forward({"params": backbone.params}, tokens)
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)

    return check
