"""Settings of every test, the tiny models they share, and the real backbone."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a program computes shows without LLVM's optimisations, which cost ten times what these tiny ones take to run. In
# the environment, so that the processes that tests start compile so too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

import contextlib
import functools
import gc
import json
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from configs import default
from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig
from spa_jax.models.llama import init_params
from spa_jax.training.config import RunConfig, parse
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

jax.config.update("jax_disable_most_optimizations", True)  # a plugin of pytest may have imported jax before
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def under_standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of a library mix dtypes; ours, and all else of theirs, must not."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **keywords)

    return call


def chain(*parts: optax.GradientTransformation, chain: Callable[..., Any] = optax.chain) -> Any:
    """`optax.chain`, whose parts may mix dtypes."""
    whole = chain(*parts)
    return whole._replace(update=under_standard_promotion(whole.update))


optax.chain = chain
jax.nn.dot_product_attention = under_standard_promotion(jax.nn.dot_product_attention)
gc.set_threshold(100_000, 20, 50)  # tracing makes many objects, few of them garbage
hypothesis.settings.register_profile(  # nothing depends on how long an example takes, which other processes decide too
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores, with its children

TINY = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)


def pytest_collection_finish() -> None:
    """Spares the collector of garbage the modules, which stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds a port that nobody listens on, and that no connection gets by itself before a process listens there."""

    def find() -> int:
        while True:
            port = random.SystemRandom().randrange(20_000, 32_000)  # Linux gives connections those from 32,768 on
            with socket.socket() as free, contextlib.suppress(OSError):
                free.bind(("127.0.0.1", port))
                return port

    return find


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


def load_smollm2(read_weights: bool = True) -> Backbone:
    try:
        return load_backbone("smollm2-135m-instruct", read_weights=read_weights)
    except UserError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """The real SmolLM2-135M-Instruct in float32, for slow tests."""
    return load_smollm2()


@pytest.fixture(scope="session")
def smollm2_without_weights() -> Backbone:
    """Its config and tokenizer."""
    return load_smollm2(read_weights=False)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory) -> Path:
    """The directory where a program compiled by one process of this session, or of one before it when the environment
    names a directory, is found by all others."""
    root = tmp_path_factory.getbasetemp()
    own = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiled"  # a worker's root is its own
    directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or own)
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    return directory


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Compiles with LLVM's optimisations, for tests of what is fast or of the program that users get."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def make_backbone_directory(tmp_path_factory) -> Callable[..., Path]:
    """Writes a tiny random LLaMA with a byte tokenizer as Hugging Face lays it out; the seed picks the weights."""

    def make(seed: int = 0) -> Path:
        directory = tmp_path_factory.mktemp("backbone")
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["</s>", "<user>", "<assistant>"])
        tokenizer.save(str(directory / "tokenizer.json"))
        template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": template}
        (directory / "tokenizer_config.json").write_text(json.dumps(described))
        v, d, f, layers, heads, kv_heads = tokenizer.get_vocab_size(), 32, 48, 3, 4, 2
        config = {
            "model_type": "llama", "vocab_size": v, "hidden_size": d, "intermediate_size": f,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": 128, "eos_token_id": tokenizer.token_to_id("</s>"), "tie_word_embeddings": False,
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config))
        kv = d * kv_heads // heads
        shapes = {"model.embed_tokens": (v, d), "lm_head": (v, d), "model.norm": (d,)}
        for layer in range(layers):
            block = {
                "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d),
                "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
                "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
            }  # fmt: skip
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        rng = np.random.default_rng(seed)
        weights = {
            f"{name}.weight": (len(shape) == 1) + 0.3 * rng.standard_normal(shape, np.float32)
            for name, shape in shapes.items()
        }
        safetensors.numpy.save_file(weights, directory / "model.safetensors")
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_backbone_directory(make_backbone_directory) -> Path:
    """A LLaMA of three blocks of width 32 over bytes, with a chat template and 128 tokens of context."""
    return make_backbone_directory()


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """Twenty training rows that all have one padded shape."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    answers = ("red", "a cat", "no", "my dog")
    rows = [{"source": f"What is thing {i}?", "target": answers[i % 4]} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tap_directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("taps")


@pytest.fixture(scope="session")
def tiny_overrides(tiny_backbone_directory, rows_file, tap_directory) -> dict[str, Any]:
    """Changes configs/default.py to a run of seconds: three steps an epoch, evaluated on its training rows."""
    return {
        "backbone": str(tiny_backbone_directory),
        "data.train": str(rows_file),
        "data.eval": str(rows_file),
        "side.entry": "head",
        "side.taps": "all",
        "side.width": 16,
        "train.epochs": 2,
        "optimizer.learning_rate": 0.01,
        "tap_cache.directory": str(tap_directory),
    }


@pytest.fixture(scope="session")
def make_config(tiny_overrides) -> Callable[..., RunConfig]:
    """A tiny run's config with some keys, such as `{"train.epochs": 3}`, set."""

    def make(keys: dict[str, Any] | None = None) -> RunConfig:
        config = default.get_config()
        config.update_from_flattened_dict(tiny_overrides | (keys or {}))
        return parse(config.to_dict())

    return make
