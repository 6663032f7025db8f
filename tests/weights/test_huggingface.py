"""Safetensors directories against transformers, which wrote them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.weights import huggingface
from spa_jax.weights.huggingface import HubUnavailable, download_snapshot, load_directory, load_tokenizer

VARIANTS = {
    "plain": {},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "explicit head_dim": {"head_dim": 12},
    "eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"kind": "Mistral", "sliding_window": None},
    "mistral with a window": {"kind": "Mistral", "sliding_window": 32},
    "qwen2": {"kind": "Qwen2", "tie_word_embeddings": True},
    "qwen3": {"kind": "Qwen3", "head_dim": 12},
    "qwen3 with biases": {"kind": "Qwen3", "head_dim": 8, "attention_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_logits_as_transformers(variant, save_model, assert_same_logits) -> None:
    model, directory = save_model(**VARIANTS[variant])
    assert_same_logits(load_directory(directory), model)


def test_layout(save_model) -> None:
    model, directory = save_model(attention_bias=True, mlp_bias=True)
    params = load_directory(directory).params
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads, kv_heads, head_dim = 4, 2, 8
    np.testing.assert_array_equal(params["embed"]["embedding"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], state["lm_head.weight"].T)
    np.testing.assert_array_equal(params["norm"]["scale"], state["model.norm.weight"])
    for layer in range(3):
        block = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), params["blocks"])
        prefix = f"model.layers.{layer}."
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weight, bias = (state[f"{prefix}self_attn.{name}_proj.{kind}"] for kind in ("weight", "bias"))
            for head in range(count):
                rows = slice(head * head_dim, (head + 1) * head_dim)
                np.testing.assert_array_equal(block["attention"][name]["kernel"][:, head], weight[rows].T)
                np.testing.assert_array_equal(block["attention"][name]["bias"][head], bias[rows])
        out = state[f"{prefix}self_attn.o_proj.weight"]
        for head in range(heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            np.testing.assert_array_equal(block["attention"]["o"]["kernel"][head], out[:, columns].T)
        np.testing.assert_array_equal(block["attention"]["o"]["bias"], state[f"{prefix}self_attn.o_proj.bias"])
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(block["mlp"][name]["kernel"], state[f"{prefix}mlp.{name}_proj.weight"].T)
            np.testing.assert_array_equal(block["mlp"][name]["bias"], state[f"{prefix}mlp.{name}_proj.bias"])
        np.testing.assert_array_equal(block["attention_norm"]["scale"], state[f"{prefix}input_layernorm.weight"])
        np.testing.assert_array_equal(block["mlp_norm"]["scale"], state[f"{prefix}post_attention_layernorm.weight"])


def test_shards_equal_the_single_file(save_model) -> None:
    _, single = save_model()
    _, sharded = save_model(save_max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = load_directory(single), load_directory(sharded)
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
    assert one.fingerprint == many.fingerprint


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_checkpoints(stored, save_model, make_model, save_tokenizer, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    model = make_model().to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "half")
    save_tokenizer(tmp_path / "half")
    wide = load_directory(tmp_path / "half", jnp.float32)
    narrow = load_directory(tmp_path / "half", jnp.bfloat16)
    expected = model.state_dict()["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(wide.params["embed"]["embedding"], expected)
    np.testing.assert_array_equal(narrow.params["embed"]["embedding"], expected.astype(ml_dtypes.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype("bfloat16")}
    assert wide.fingerprint == narrow.fingerprint


def _describe(directory: pathlib.Path, file: str, changes: dict) -> None:
    path = directory / file
    described = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**described, **changes}))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, {"eos_token_id": [11, 9]}, (9, 11)),
        ([7, 8], {"eos_token_id": 9}, (9,)),
        ([8, 7], None, (7, 8)),
        (None, {"eos_token_id": 9}, (9,)),
        # Nothing would end a generation of transformers here.
        (7, {"temperature": 0.5}, (7,)),
        (7, {"eos_token_id": []}, (7,)),
        (None, None, (256,)),
    ],
)
def test_stop_tokens_are_those_that_transformers_takes_where_it_has_some(
    config, generation, expected, save_model
) -> None:
    transformers = pytest.importorskip("transformers")
    _, directory = save_model()
    _describe(directory, "config.json", {"eos_token_id": config})
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        _describe(directory, "generation_config.json", generation)
    assert load_directory(directory).eos_ids == expected
    judged = transformers.AutoModelForCausalLM.from_pretrained(directory).generation_config.eos_token_id
    assert not judged or sorted(judged if isinstance(judged, list) else [judged]) == list(expected)


def test_a_generation_ends_where_that_of_transformers_does(save_model) -> None:
    torch = pytest.importorskip("torch")
    model, directory = save_model(eos_token_id=1)
    prompt, new = [233, 46, 28, 33, 182], 16

    def both(**stop: int) -> tuple[list[int], list[int]]:
        judged = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0, **stop)
        (ours,) = FusedModel(load_directory(directory), None).generate([prompt], new)
        return list(ours.tokens), judged[0, len(prompt) :].tolist()

    ours, judged = both()
    assert ours == judged
    assert len(ours) == new
    # The tokenizer's EOS comes in the middle of this, and ends nothing: the config names another.
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    end = load_tokenizer(directory).convert_ids_to_tokens(next(token for token in ours if token < 256))
    (directory / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": end}))
    assert both() == (judged, judged)
    _describe(directory, "generation_config.json", {"eos_token_id": ours[4]})
    ours, judged = both(eos_token_id=ours[4])
    assert ours == judged
    assert len(ours) <= 5


@pytest.mark.parametrize("given", ["256", [256, None], [1, "2"], -1, 2.0, True, {"a": 1}], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_stop_tokens_that_are_no_ids_are_refused(file, given, save_model) -> None:
    _, directory = save_model()
    (directory / "generation_config.json").unlink(missing_ok=True)
    _describe(directory, file, {"eos_token_id": given})
    with pytest.raises(UserError, match=rf"{file}: eos_token_id = .* is not supported"):
        load_directory(directory)


def test_a_tokenizer_larger_than_the_embedding_is_refused(save_model) -> None:
    _, directory = save_model()
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(43)])
    tokenizer.save_pretrained(directory)
    assert len(load_directory(directory).tokenizer) == 300
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(UserError, match=r"301 tokens with ids up to 300, and the embedding has 300 rows .*'<pad>'"):
        load_directory(directory)


def test_a_stop_token_beyond_the_embedding_is_refused(save_model) -> None:
    _, directory = save_model()
    _describe(directory, "generation_config.json", {"eos_token_id": [2, 300]})
    with pytest.raises(UserError, match="eos_token_id 300 is no token of a vocabulary of 300"):
        load_directory(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_are_refused_by_name(name, value, save_model) -> None:
    _, directory = save_model()
    _edit(directory, lambda tensors: tensors[name].reshape(-1).__setitem__(-1, value))
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " has values that are NaN or infinite"):
        load_directory(directory)


def _edit(directory: pathlib.Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_all_wrong_names_in_one_error(save_model) -> None:
    _, directory = save_model()

    def change(tensors: dict) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((5, 32), np.float32)

    _edit(directory, change)
    with pytest.raises(UserError) as error:
        load_directory(directory)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "unknown: model.layers.0.self_attn.q_norm.weight, model.layers.9.mlp.up_proj.weight" in message
    assert "model.embed_tokens.weight has [5, 32], expected [300, 32]" in message


def test_a_bias_the_config_does_not_mention_is_an_error(save_model) -> None:
    _, directory = save_model(attention_bias=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(UserError, match=r"unknown: model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_directory(directory)


def test_rotary_buffers_are_ignored(save_model) -> None:
    _, directory = save_model()
    fingerprint = load_directory(directory).fingerprint
    buffer = np.ones(4, np.float32)
    _edit(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": buffer}))
    assert load_directory(directory).fingerprint == fingerprint


def test_quantised_tensors_are_refused(save_model) -> None:
    _, directory = save_model()
    _edit(directory, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int8)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is I8"):
        load_directory(directory)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_file_is_named(damage, save_model) -> None:
    _, directory = save_model()
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-10], "garbage": b"\x00\xff" * 500, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt or truncated"):
        load_directory(directory)


@pytest.mark.parametrize("file", [3, None, ["model.safetensors"]], ids=str)
def test_an_index_whose_files_have_no_names_is_refused(file, save_model) -> None:
    _, directory = save_model(save_max_shard_size="20KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json has no weight_map that names the file of each tensor"):
        load_directory(directory)


def test_missing_shard_is_named(save_model) -> None:
    _, directory = save_model(save_max_shard_size="20KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_directory(directory)


def test_an_index_that_disagrees_with_its_shards_is_refused(save_model) -> None:
    _, directory = save_model(save_max_shard_size="20KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.extra\.weight"):
        load_directory(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(name, save_model) -> None:
    _, directory = save_model()
    (directory / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_directory(directory)


@pytest.mark.parametrize("content", ["{", '{"a": ' * 100_000], ids=["open", "deep"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_broken_json_is_named(name, content, save_model) -> None:
    _, directory = save_model()
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_directory(directory)


def test_tokenizer_does_exactly_what_its_file_says(save_model) -> None:
    from tokenizers import Tokenizer

    _, directory = save_model()
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = load_directory(directory).tokenizer
    for text in ("Hello  world 123", " naïve\n\n\tcafé", "a</s>b", ""):
        assert tokenizer(text)["input_ids"] == reference.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("length", [3, "many", [], None])
def test_a_text_may_be_longer_than_its_tokenizers_file_says(length, save_model, caplog) -> None:
    _, directory = save_model()
    described = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**described, "model_max_length": length}))
    tokenizer = load_directory(directory, read_weights=False).tokenizer
    assert len(tokenizer("a" * 99)["input_ids"]) == 99
    assert not [message for message in caplog.messages if "longer" in message]


def test_an_unreachable_hub_is_a_user_error(monkeypatch) -> None:
    asked = []

    class Api:
        def model_info(self, name: str, timeout: float) -> None:
            asked.append((name, timeout))
            raise ConnectionError("no route to host")

    def snapshot(name: str, local_files_only: bool, **_) -> str:
        assert local_files_only
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface.huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface.huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(HubUnavailable, match=r"org/model.*no route to host"):
        download_snapshot("org/model")
    assert asked[0][0] == "org/model"
    assert asked[0][1] <= 5
