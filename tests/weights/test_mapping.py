"""The conversion itself, on sources made in memory."""

import collections
import dataclasses
import hashlib
import json
import threading

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig
from spa_jax.models.llama import init_params
from spa_jax.weights.mapping import TABLE, _fingerprint, convert

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
    attention_bias=True, mlp_bias=True,
)  # fmt: skip


class MemorySource:
    """Tensors from a dictionary; counts what is read."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.reads: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        with self._lock:
            self.reads[name] += 1
        return self.tensors[name]


def _tensors(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names and shapes, written out here independently of the table."""
    c = config
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        for name, out, into, bias in (
            ("self_attn.q_proj", wide, c.hidden_size, c.attention_bias),
            ("self_attn.k_proj", narrow, c.hidden_size, c.attention_bias),
            ("self_attn.v_proj", narrow, c.hidden_size, c.attention_bias),
            ("self_attn.o_proj", c.hidden_size, wide, c.attention_bias),
            ("mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
            ("mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
            ("mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = (out, into)
            if bias:
                shapes[f"model.layers.{layer}.{name}.bias"] = (out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (c.hidden_size,)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(dtype: str, tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params, _ = convert(config, MemorySource(_tensors(config)), dtype)
    expected = jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(dtype)), init_params(config, abstract=True))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == expected


def test_the_table_has_no_row_that_no_model_uses() -> None:
    params = init_params(dataclasses.replace(CONFIG, qk_norm=True), abstract=True)
    paths = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert {path for path, _ in TABLE.values()} == paths


def test_fields_that_a_model_does_not_need_leave_its_fingerprint_as_it_was() -> None:
    """A plugin knows its backbone by the fingerprint."""
    plain = dataclasses.replace(CONFIG, attention_bias=False, mlp_bias=False, tie_word_embeddings=True)
    config = {key: value for key, value in dataclasses.asdict(plain).items() if key not in ("qkv_bias", "qk_norm")}
    assert len(config) == 14
    described = json.dumps([config, [["a", "b"]]], sort_keys=True)
    assert _fingerprint(plain, {"a": "b"}) == hashlib.sha256(described.encode()).hexdigest()[:32]
    others = {_fingerprint(dataclasses.replace(plain, **{name: True}), {"a": "b"}) for name in ("qkv_bias", "qk_norm")}
    assert len({*others, _fingerprint(plain, {"a": "b"})}) == 3


def test_every_tensor_is_read_once() -> None:
    source = MemorySource(_tensors(CONFIG))
    convert(CONFIG, source)
    assert source.reads == dict.fromkeys(source.tensors, 1)


def test_nothing_is_read_when_names_are_wrong() -> None:
    tensors = _tensors(CONFIG)
    del tensors["model.layers.2.mlp.up_proj.bias"]
    source = MemorySource(tensors)
    with pytest.raises(UserError, match=r"missing: model\.layers\.2\.mlp\.up_proj\.bias"):
        convert(CONFIG, source)
    assert not source.reads


def test_a_converted_parameter_survives_its_source() -> None:
    tensors = _tensors(CONFIG)
    params, _ = convert(CONFIG, MemorySource(tensors))
    before = np.array(params["embed"]["embedding"])
    tensors["model.embed_tokens.weight"][:] = 0
    np.testing.assert_array_equal(params["embed"]["embedding"], before)


def test_tied_head_must_equal_the_embedding() -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    tensors = _tensors(config)
    _, fingerprint = convert(config, MemorySource(tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = MemorySource(tensors)
    params, with_head = convert(config, source)
    assert "lm_head" not in params
    assert with_head == fingerprint
    assert source.reads["lm_head.weight"] == 1
    tensors["lm_head.weight"][3, 3] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        convert(config, MemorySource(tensors))


def test_fingerprint_is_of_config_and_weights_alone() -> None:
    config = dataclasses.replace(CONFIG, num_layers=2)
    tensors = _tensors(config)
    _, fingerprint = convert(config, MemorySource(tensors))
    assert len(fingerprint) >= 16
    assert int(fingerprint, 16)
    assert convert(config, MemorySource(tensors), jnp.bfloat16)[1] == fingerprint
    reordered = dict(reversed(tensors.items()))
    assert convert(config, MemorySource(reordered))[1] == fingerprint
    assert convert(dataclasses.replace(config, rope_theta=1.0), MemorySource(tensors))[1] != fingerprint
    for name, tensor in tensors.items():
        changed = {**tensors, name: tensor + 1e-3}
        assert convert(config, MemorySource(changed))[1] != fingerprint, name


def test_fingerprint_samples_every_column_of_a_large_tensor() -> None:
    config = LlamaConfig(2048, 16, 8, 1, 1, 1, 16)  # 32 rows for a sample: a stride of whole rows sees few columns
    tensors = _tensors(config)
    _, fingerprint = convert(config, MemorySource(tensors))
    seen = 0
    for column in range(16):
        embedding = tensors["model.embed_tokens.weight"].copy()
        embedding[:, column] += 1
        _, changed = convert(config, MemorySource({**tensors, "model.embed_tokens.weight": embedding}))
        seen += changed != fingerprint
    assert seen == 16


def test_placement_on_a_mesh() -> None:
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("model",))
    shapes = {}

    def shardings(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        shapes[path] = shape
        spec = jax.sharding.PartitionSpec("model") if path == "embed/embedding" else jax.sharding.PartitionSpec()
        return jax.sharding.NamedSharding(mesh, spec)

    tensors = _tensors(CONFIG)
    plain, fingerprint = convert(CONFIG, MemorySource(tensors))
    sharded, same = convert(CONFIG, MemorySource(tensors), shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(plain), jax.device_get(sharded))
    assert same == fingerprint
    assert sharded["embed"]["embedding"].addressable_shards[0].data.shape == (40 // len(devices), 8)
    assert shapes == {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(plain, sep="/").items()}


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UserError, match="float16"):
        convert(CONFIG, MemorySource(_tensors(CONFIG)), jnp.float16)
