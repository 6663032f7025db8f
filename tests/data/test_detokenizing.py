"""Texts of single tokens against the text of all of them, which the tokenizer itself decodes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spa_jax.data.detokenizing import AnswerText, StreamingDetokenizer, token_texts

REPLACE, BYTES, FUSE, STRIP = (
    decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
)  # fmt: skip
DECODERS = {
    "sentencepiece": decoders.Sequence([REPLACE, BYTES, FUSE, STRIP]),
    "without prefix": decoders.Sequence([REPLACE, BYTES, FUSE]),
    "metaspace": decoders.Sequence([BYTES, decoders.Metaspace()]),
    "byte level": decoders.ByteLevel(),
}
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    byte_level, with_fallback = sorted(pre_tokenizers.ByteLevel.alphabet()), [*BYTE_NAMES, "\u2581word", "\u2581", "a"]
    names = byte_level if kind == "byte level" else with_fallback
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = DECODERS[kind]
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["日本"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


TOKENIZERS = {kind: make_tokenizer(kind) for kind in DECODERS}


def ids(kind: str, *names: str) -> list[int]:
    return [TOKENIZERS[kind].convert_tokens_to_ids(name) for name in names]


FACE = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        ([*FACE, "\u2581word"], ["", "", "", "😀", " word"]),
        ([*FACE, "</s>"], ["", "", "", "😀", ""]),
        ([*FACE, "<0xF0>", "\u2581word"], ["", "", "", "", "\ufffd" * 5, " word"]),
        (["\u2581word", *FACE[:2]], ["word", "", "\ufffd\ufffd"]),
        ([*FACE[:2], "</s>", *FACE[2:], "a"], ["", "", "", "", "😀", "a"]),
        (["a", "\u2581", "\u2581word"], ["a", " ", " word"]),
    ],
)
def test_a_run_of_bytes_comes_with_its_last_token(names, texts):
    assert token_texts(TOKENIZERS["sentencepiece"], ids("sentencepiece", *names)) == texts


PARTS = {
    kind: [*(TOKENIZERS[kind].convert_tokens_to_ids(["</s>", "日本", *special])), 5000]
    for kind, special in {
        **{kind: [*FACE, "<0x20>", "<0x41>", "<0xE2>", "\u2581word", "\u2581", "a"] for kind in DECODERS},
        "byte level": ["ð", "Ł", "ĺ", "Ģ", "Ġ", "a", "ÿ"],
    }.items()
}


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=150)
@given(data=st.data())
def test_the_texts_of_all_tokens_are_the_text_of_all(kind, data):
    tokenizer = TOKENIZERS[kind]
    tokens = data.draw(st.lists(st.sampled_from(PARTS[kind]), max_size=9))
    texts = token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == tokenizer.decode(tokens, skip_special_tokens=True)
    stream = StreamingDetokenizer(tokenizer)
    shown = [text for token in tokens for text in stream.add(token)]
    assert shown == token_texts(tokenizer, tokens, ended=False) == texts[: len(shown)]
    assert shown + stream.finish() == texts


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=100)
@given(data=st.data())
def test_an_answer_ends_in_front_of_the_first_text_that_ends_it(kind, data):
    tokenizer = TOKENIZERS[kind]
    tokens = data.draw(st.lists(st.sampled_from(PARTS[kind]), max_size=9))
    stop = data.draw(st.lists(st.text("aword \U0001f600", min_size=1, max_size=3), max_size=3))
    whole, texts = tokenizer.decode(tokens, skip_special_tokens=True), token_texts(tokenizer, tokens)
    ends = sorted((whole.find(each) + len(each), whole.find(each)) for each in stop if each in whole)
    answer, shown = AnswerText(tokenizer, stop), [""]
    for count in range(1, len(tokens) + 1):
        answer.read(tokens[:count])
        shown.append("".join(answer.pieces))
    answer.read(tokens, is_last=True)
    shown.append("".join(answer.pieces))
    assert shown[-1] == (whole[: ends[0][1]] if ends else whole)  # the first that is complete
    assert answer.is_stopped == bool(ends)
    assert all(after.startswith(before) for before, after in itertools.pairwise(shown))  # nothing is taken back
    count = answer.num_tokens(len(tokens))
    if not answer.is_stopped:
        assert answer.pieces == texts
        assert count == len(tokens)
    else:
        assert count == len(answer.pieces)
        assert answer.pieces[:-1] == texts[: max(count - 1, 0)]
        assert texts[count - 1].startswith(answer.pieces[-1]) if count else True
