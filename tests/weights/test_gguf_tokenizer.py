"""Tokenizers from GGUF metadata against transformers, tokenizers and sentencepiece."""

import io
import json
import pathlib
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from spa_jax.errors import UserError
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.gguf_file import GGUFFile
from spa_jax.weights.gguf_tokenizer import eos_ids, tokenizer_from_metadata
from spa_jax.weights.registry import cache_directory

NOWHERE = pathlib.Path("test.gguf")
TEXTS = [
    "Hello world", " leading", "  two leading", "trailing  ", "a  b   c", "tabs\t\tand\nnew\n\nlines\r\n", "12345",
    "in 1999, 3.14 and 42", "x1y22z333", "naïve café", "日本語のテキスト", "emoji 👩‍👩‍👧‍👦 🏳️‍🌈",
    "<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b", "<|im_start|> <repo_name>", "don't I'll we'RE",
    "\u00a0nbsp\u3000", "def f(x):\n    return x**2\n", "", "\n", "   ", "e\u0301 combining", " 1", "\n1",
    "$%^&*()_+-=[]{}|;':\",./<>?",
]  # fmt: skip
SPACES_BEFORE_NUMBERS = ["in  42", "  1", "½ ² Ⅷ ٣", "a   2  b"]
CORPUS = ["the quick brown fox doesn't jump over 1234 lazy dogs\n\n", "in 1999 THE prices rose 3.14%  twice"] * 20


@pytest.fixture(scope="module")
def smollm2(smollm2_without_weights) -> Backbone:
    return smollm2_without_weights


@pytest.fixture(scope="module")
def smollm2_path(smollm2) -> pathlib.Path:
    files = list((cache_directory() / "backbones" / smollm2.name).glob("*.gguf"))
    if not files:
        pytest.skip("SmolLM2 came from the hub, not as GGUF")
    return files[0]


@pytest.fixture(scope="module")
def reference(smollm2_path) -> Any:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_smollm2_equals_transformers(text, smollm2, reference) -> None:
    ids = smollm2.tokenizer(text)["input_ids"]
    assert ids == reference(text)["input_ids"]
    assert smollm2.tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS + SPACES_BEFORE_NUMBERS, ids=repr)
def test_smollm2_splits_digits_as_its_tokenizer_json_does(text, smollm2, reference) -> None:
    """Transformers ignores `tokenizer.ggml.pre` here; what SmolLM2 publishes is `Digits`, then `ByteLevel`."""
    published = Tokenizer.from_str(reference.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    published.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert smollm2.tokenizer(text)["input_ids"] == published.encode(text).ids


def test_smollm2_special_tokens_and_chat(smollm2, reference) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.special_tokens_map == reference.special_tokens_map
    assert len(tokenizer) == len(reference) == smollm2.config.vocab_size
    chat = [{"role": "user", "content": "Who wrote 1984?"}, {"role": "assistant", "content": "George Orwell."}]
    for generate in (False, True):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
        assert text == reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
        assert text.endswith("<|im_start|>assistant\n") == generate
    assert smollm2.eos_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    ids = tokenizer("<|im_start|>hi<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def _byte_level_metadata(pre: str) -> dict[str, Any]:
    """A vocabulary trained on `CORPUS`, with a control and a user-defined token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<|bos|>", "<|eot|>", "<think>"],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 4],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.eot_token_id": 5,
    }


def _write(metadata: dict[str, Any], path: pathlib.Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writers = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        writers[type(value)](key, value)
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 512)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "llama3", "llama-v3"])
def test_byte_level_equals_transformers(pre, tmp_path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    metadata = {**_byte_level_metadata(pre), "tokenizer.ggml.add_bos_token": False}
    _write(metadata, tmp_path / "t.gguf")
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    tokenizer = tokenizer_from_metadata(GGUFFile(tmp_path / "t.gguf").metadata, NOWHERE)
    # Transformers adds <|endoftext|> to every such vocabulary, whether the file has it or not.
    texts = [text for text in TEXTS if "<|endoftext|>" not in text]
    for text in [*texts, *SPACES_BEFORE_NUMBERS, *CORPUS, "a<|eot|>b <think> c", "1234567 890"]:
        ids = tokenizer(text)["input_ids"]
        assert ids == judge(text)["input_ids"], text
        assert tokenizer.decode(ids) == text


def test_qwen2_equals_transformers() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    metadata = _byte_level_metadata("qwen2")
    tokens, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    judge = transformers.Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges]
    )
    tokenizer = tokenizer_from_metadata(metadata, NOWHERE)
    for text in [*TEXTS, *SPACES_BEFORE_NUMBERS, *CORPUS, "1234567 890"]:
        if "<|endoftext|>" not in text:  # transformers adds it
            assert tokenizer(text)["input_ids"] == judge(text)["input_ids"], text


def test_default_splits_punctuation_and_triples_of_digits() -> None:
    tokenizer = tokenizer_from_metadata(_byte_level_metadata("default"), NOWHERE)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 1234567, ok $5")
    assert [piece for piece, _ in pieces] == ["it", "'", "s", "Ġ", "123", "456", "7", ",", "Ġok", "Ġ", "$", "5"]


def test_bos_and_eos_around_text() -> None:
    metadata = _byte_level_metadata("llama-bpe")
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    inside = tokenizer_from_metadata({**metadata, "tokenizer.ggml.add_bos_token": False}, NOWHERE)("the fox")[
        "input_ids"
    ]
    assert tokenizer_from_metadata(metadata, NOWHERE)("the fox")["input_ids"] == [bos, *inside]
    both = {**metadata, "tokenizer.ggml.add_eos_token": True}
    assert tokenizer_from_metadata(both, NOWHERE)("the fox")["input_ids"] == [bos, *inside, eos]
    bare = tokenizer_from_metadata(both, NOWHERE)("the fox", add_special_tokens=False)["input_ids"]
    assert bare == inside
    del both["tokenizer.ggml.bos_token_id"]
    with pytest.raises(UserError, match="bos_token"):
        tokenizer_from_metadata(both, NOWHERE)
    assert eos_ids(metadata) == (5, eos)


@pytest.mark.parametrize("index", [-1, 2**32 - 1, 10**6, "5", None])
def test_a_special_token_that_the_vocabulary_has_not_is_none(index) -> None:
    metadata = _byte_level_metadata("smollm")
    roles = ("bos", "eos", "unknown", "padding")
    tokenizer = tokenizer_from_metadata({**metadata, **{f"tokenizer.ggml.{r}_token_id": index for r in roles}}, NOWHERE)
    assert tokenizer.special_tokens_map == {}
    assert eos_ids({**metadata, "tokenizer.ggml.eos_token_id": index}) == (5,)
    assert eos_ids({**metadata, "tokenizer.ggml.eot_token_id": index}) == (metadata["tokenizer.ggml.eos_token_id"],)
    with pytest.raises(UserError, match="text shall get a bos_token but the file names none"):
        tokenizer_from_metadata(
            {**metadata, "tokenizer.ggml.bos_token_id": index, "tokenizer.ggml.add_bos_token": True}, NOWHERE
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", ["a"]), ("tokens", 3), ("tokens", [1]), ("merges", ["x y"]), ("merges", [1]), ("model", []),
    ],
)  # fmt: skip
def test_a_vocabulary_that_makes_no_sense_is_one_line(key, value) -> None:
    with pytest.raises(UserError, match=r"^test\.gguf: ") as refused:
        tokenizer_from_metadata({**_byte_level_metadata("smollm"), f"tokenizer.ggml.{key}": value}, NOWHERE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["model", "tokens", "merges", "pre"])
def test_missing_key_is_named(key) -> None:
    metadata = _byte_level_metadata("smollm")
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(UserError, match=rf"tokenizer\.ggml\.{key}"):
        tokenizer_from_metadata(metadata, NOWHERE)


@pytest.fixture(scope="module")
def sentencepiece_model() -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=written, model_type="bpe", vocab_size=380, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<think>"],
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def _sentencepiece_metadata(model: Any) -> dict[str, Any]:
    count = model.get_piece_size()

    def kind(index: int) -> int:
        if model.is_unknown(index):
            return 2
        if model.is_control(index):
            return 3
        if model.id_to_piece(index) == "<think>":
            return 4
        return 6 if model.is_byte(index) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in range(count)],
        "tokenizer.ggml.scores": [model.get_score(index) for index in range(count)],
        "tokenizer.ggml.token_type": [kind(index) for index in range(count)],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def test_sentencepiece(sentencepiece_model) -> None:
    tokenizer = tokenizer_from_metadata(_sentencepiece_metadata(sentencepiece_model), NOWHERE)
    for text in [*TEXTS, *SPACES_BEFORE_NUMBERS, *CORPUS]:
        ids = tokenizer(text)["input_ids"]
        assert ids == [sentencepiece_model.bos_id(), *sentencepiece_model.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_tokens_to_ids("<think>") in tokenizer("the <think> fox")["input_ids"]


def test_sentencepiece_without_the_leading_space(sentencepiece_model) -> None:
    metadata = {**_sentencepiece_metadata(sentencepiece_model), "tokenizer.ggml.add_space_prefix": False}
    tokenizer = tokenizer_from_metadata(metadata, NOWHERE)
    with_space = tokenizer_from_metadata(_sentencepiece_metadata(sentencepiece_model), NOWHERE)
    for text in ("the quick fox", "日本"):
        assert tokenizer(f" {text}")["input_ids"] == with_space(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
