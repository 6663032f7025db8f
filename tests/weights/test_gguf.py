"""GGUF files that llama.cpp's own Python package writes from tiny Hugging Face models, and the real SmolLM2."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig, RopeScaling, rope_frequencies
from spa_jax.models.llama import Llama
from spa_jax.weights.gguf import load_gguf
from spa_jax.weights.gguf_file import GGUFFile
from spa_jax.weights.registry import load_backbone

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0, h/2, 1, h/2 + 1, ..., as llama.cpp's rotary embedding pairs them."""
    head_dim = rows.shape[0] // heads
    half = head_dim // 2
    order = [head * head_dim + pair + part * half for head in range(heads) for pair in range(half) for part in (0, 1)]
    return rows[order]


@pytest.fixture
def write_gguf(tmp_path) -> Callable[..., pathlib.Path]:
    def write(
        model: Any, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None, extra: dict | None = None,
    ) -> pathlib.Path:  # fmt: skip
        path = tmp_path / "model.gguf"
        c = model.config
        architecture = {"mistral": "llama"}.get(c.model_type, c.model_type)
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_vocab_size(c.vocab_size)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_block_count(c.num_hidden_layers)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", *(f"<{index}>" for index in range(3, c.vocab_size))])
        writer.add_token_types([1] * c.vocab_size)
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(2)
        metadata(writer)
        tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        if c.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        for name, tensor in tensors.items():
            for projection, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
                if f".{projection}." in name and architecture == "llama":
                    tensor = _interleave(tensor, heads)
            this = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                _gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(tensor), this), raw_dtype=this
            )
        for name, tensor in (extra or {}).items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12},
        {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"kind": "Mistral", "sliding_window": None},
        {"kind": "Qwen2", "tie_word_embeddings": True},
        {"kind": "Qwen3", "head_dim": 12},
    ],
    ids=str,
)
def test_same_logits_as_the_model_it_was_written_from(overrides, make_model, write_gguf, assert_same_logits) -> None:
    model = make_model(**overrides)
    backbone = load_gguf(write_gguf(model))
    assert_same_logits(backbone, model)
    assert backbone.eos_ids == (2,)


def test_linear_scaling(make_model, write_gguf, assert_same_logits) -> None:
    model = make_model(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0})

    def scaled(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    backbone = load_gguf(write_gguf(model, metadata=scaled))
    assert backbone.config.rope_scaling == RopeScaling("linear", 4.0)
    assert_same_logits(backbone, model)


def _llama3_divisors(config: LlamaConfig, **changes: float) -> np.ndarray:
    scaling = {**{key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}, **changes}
    wavelengths = 2 * np.pi / np.asarray(rope_frequencies(config))
    original = scaling["original_max_position_embeddings"]
    divisors = []
    for wavelength in wavelengths:
        if wavelength < original / scaling["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / scaling["low_freq_factor"]:
            divisors.append(scaling["factor"])
        else:
            smooth = original / wavelength - scaling["low_freq_factor"]
            smooth /= scaling["high_freq_factor"] - scaling["low_freq_factor"]
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


def _plain(head_dim: int) -> LlamaConfig:
    return LlamaConfig(300, 32, 48, 3, 4, 2, head_dim, rope_theta=5e5)


def test_llama3_scaling_is_recovered(make_model, write_gguf, assert_same_logits) -> None:
    model = make_model(rope_parameters=LLAMA3, head_dim=32)
    backbone = load_gguf(write_gguf(model, extra={"rope_freqs.weight": _llama3_divisors(_plain(32))}))
    assert backbone.config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert_same_logits(backbone, model)


@pytest.mark.parametrize("changes", [{"high_freq_factor": 8.0}, {"original_max_position_embeddings": 2048}], ids=str)
def test_other_llama3_scalings_are_refused(changes, make_model, write_gguf) -> None:
    model = make_model(rope_parameters=LLAMA3, head_dim=32)
    divisors = _llama3_divisors(_plain(32), **changes)
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        load_gguf(write_gguf(model, extra={"rope_freqs.weight": divisors}))


def test_divisors_of_one_scale_nothing(make_model, write_gguf) -> None:
    path = write_gguf(make_model(), extra={"rope_freqs.weight": np.ones(4, np.float32)})
    assert load_gguf(path).config.rope_scaling is None


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised(kind, make_model, write_gguf) -> None:
    model = make_model(hidden_size=64, intermediate_size=96)
    backbone = load_gguf(write_gguf(model, gguf.GGMLQuantizationType[kind]))
    tolerance = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(kind, 0.15)
    kernel = np.asarray(backbone.params["blocks"]["attention"]["q"]["kernel"][1])
    expected = model.model.layers[1].self_attn.q_proj.weight.detach().numpy().T.reshape(kernel.shape)
    assert np.abs(kernel - expected).max() < tolerance
    assert np.corrcoef(kernel.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.fixture
def write_tensor(tmp_path) -> Callable[..., GGUFFile]:
    def write(data: np.ndarray, kind: gguf.GGMLQuantizationType | None = None) -> GGUFFile:
        writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
        writer.add_tensor("one", data, raw_dtype=kind)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return GGUFFile(tmp_path / "one.gguf")

    return write


def test_float64_is_read_as_float32(write_tensor) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4))
    read = write_tensor(values).dequantize("one")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32))


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_a_tensor_is_read_or_its_type_is_refused_by_name(kind, write_tensor) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    file = write_tensor(np.zeros((2, size * max(1, 256 // block)), np.uint8), kind)
    if kind.name in ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64"):
        with pytest.raises(UserError, match=f"the tensor one is of type {kind.name}, which holds no weights"):
            file.dequantize("one")
    else:
        read = file.dequantize("one")
        assert read.shape == (2, max(block, 256))
        assert read.dtype in (np.float32, np.float16)


def test_weights_that_are_not_finite_are_refused_by_name(make_model, write_gguf) -> None:
    model = make_model()
    model.state_dict()["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.down_proj\.weight has values that are NaN"):
        load_gguf(write_gguf(model))


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}<9>{% endfor %}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.add_eot_token_id(4), (2, 4)),
        (lambda w: w.add_eot_token_id(2**32 - 1), (2,)),
        (lambda w: w.add_eos_token_id(2**32 - 1), ()),
        (lambda w: w.add_chat_template(TURNS), (2,)),  # <9> is no special token there
        (lambda w: (w.add_chat_template(TURNS), w.add_token_types([1] * 9 + [3] * 291)), (2, 9)),
        (lambda w: w.add_chat_template("{{ raise_exception('no') }}"), (2,)),
    ],
)
def test_stop_tokens_are_those_that_are_named_and_the_one_that_ends_a_turn(
    change, expected, make_model, write_gguf
) -> None:
    assert load_gguf(write_gguf(make_model(), metadata=change)).eos_ids == expected


def test_a_vocabulary_larger_than_the_embedding_is_refused(make_model, write_gguf) -> None:
    tokens = ["a", "b", "ab", *(f"<{index}>" for index in range(3, 305))]

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))

    with pytest.raises(UserError, match=r"305 tokens with ids up to 304, and the embedding has 300 rows .*'<300>'"):
        load_gguf(write_gguf(make_model(), metadata=more))


def test_fingerprint_does_not_depend_on_the_dtype(make_model, write_gguf) -> None:
    path = write_gguf(make_model())
    wide, narrow = load_gguf(path), load_gguf(path, jnp.bfloat16)
    assert wide.fingerprint == narrow.fingerprint
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count"),
        (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window"),
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "yarn"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal"),
        (lambda w: w.add_uint16("split.count", 3), "split.count"),
        (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count"),
        (lambda w: w.add_tokenizer_pre("tekken"), "tokenizer.ggml.pre = 'tekken'"),
        (lambda w: w.add_tokenizer_model("t5"), "tokenizer.ggml.model = 't5'"),
        (lambda w: w.add_uint64("llama.context_length", 2**40), "llama.context_length = 1099511627776"),
    ],
)
def test_unsupported_metadata_is_refused_by_name(change, named, make_model, write_gguf) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        load_gguf(write_gguf(make_model(), metadata=change))


def test_unknown_tensor_is_refused_by_name(make_model, write_gguf) -> None:
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, np.float32), "output.weird": np.ones(8, np.float32)}
    with pytest.raises(UserError, match=r"unknown: model\.layers\.0\.self_attn\.q_norm\.weight, output\.weird"):
        load_gguf(write_gguf(make_model(), extra=extra))


def test_every_truncation_is_noticed(make_model, write_gguf, tmp_path) -> None:
    content = write_gguf(make_model()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 20, 100, 2000, len(content) // 2, len(content) - 100):
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            GGUFFile(cut)
    cut.write_bytes(b"GGML" + content[4:])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        GGUFFile(cut)


def test_both_formats_load_without_torch(save_model, write_gguf) -> None:
    """The same ids and weights in a process where importing torch fails."""
    model, directory = save_model()
    paths = [str(directory), str(write_gguf(model))]
    program = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from spa_jax.weights.registry import load_backbone\n"
        f"for backbone in map(load_backbone, {paths!r}):\n"
        "    print(json.dumps([backbone.fingerprint, backbone.tokenizer('ab b')['input_ids']]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, check=True, env=environment, timeout=600, stdout=subprocess.PIPE, text=True)
    here = [[backbone.fingerprint, backbone.tokenizer("ab b")["input_ids"]] for backbone in map(load_backbone, paths)]
    assert [json.loads(line) for line in finished.stdout.splitlines()] == here
    assert all(ids for _, ids in here)


@pytest.fixture(scope="module")
def smollm2_path(smollm2) -> pathlib.Path:
    from spa_jax.weights.registry import cache_directory

    files = list((cache_directory() / "backbones" / smollm2.name).glob("*.gguf"))
    if not files:
        pytest.skip("SmolLM2 came from the hub, not as GGUF")
    return files[0]


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2, smollm2_path, assert_same_logits) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    state = model.state_dict()
    attention = smollm2.params["blocks"]["attention"]
    np.testing.assert_array_equal(smollm2.params["embed"]["embedding"], state["model.embed_tokens.weight"])
    for layer in (0, 17, 29):
        for name in ("q", "k", "v"):
            expected = state[f"model.layers.{layer}.self_attn.{name}_proj.weight"].numpy().T
            np.testing.assert_array_equal(
                np.asarray(attention[name]["kernel"][layer]).reshape(expected.shape), expected
            )
        expected = state[f"model.layers.{layer}.mlp.down_proj.weight"].numpy().T
        np.testing.assert_array_equal(smollm2.params["blocks"]["mlp"]["down"]["kernel"][layer], expected)
    assert smollm2.config.rms_norm_eps == 1e-5
    assert smollm2.config.rope_theta == 1e5
    tokens = smollm2.tokenizer("The capital of France is Paris, and of Italy", return_tensors="np")["input_ids"]
    llama, variables = Llama(smollm2.config), {"params": smollm2.params}
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden = llama.apply(variables, jnp.asarray(tokens, jnp.int32), positions).hidden
    logits = llama.apply(variables, hidden, method="logits")
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert smollm2.tokenizer.decode([int(logits[0, -1].argmax())]).strip()
