"""Prompts and targets as tokens: what predicts what, and what is cut."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_jax.data.encoding import Encoder, Example
from spa_jax.data.tasks import Pair
from spa_jax.errors import UserError
from spa_jax.weights.huggingface import load_tokenizer

PAIR = Pair("What is my cat called?", "Miso", origin="rows.jsonl, line 3")


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone_directory):
    """A token a byte, and a chat template."""
    return load_tokenizer(tiny_backbone_directory)


@pytest.fixture(scope="module", params=["chat", "plain"])
def encoder(request, tokenizer):
    return Encoder(tokenizer, request.param, 60)


def test_each_position_predicts_the_next_token_from_the_prompts_last_to_the_one_before_eos(encoder):
    example, cut = encoder.encode(PAIR)
    prompt, eos = encoder.prompt(PAIR.source), encoder.tokenizer.eos_token_id
    assert not cut
    assert example.tokens.tolist() == prompt + example.targets.tolist()[:-1]
    assert encoder.tokenizer.decode(example.targets) == "Miso</s>"
    assert example.targets[-1] == eos
    assert eos not in example.tokens
    assert example.predict.tolist() == [len(prompt) - 1 + i for i in range(5)]
    assert example.tokens[example.predict[1:]].tolist() == example.targets[:-1].tolist()
    assert {array.dtype for array in example} == {np.dtype(np.int32)}


def test_the_templates_write_the_source_as_they_say(tokenizer):
    written = [tokenizer.decode(Encoder(tokenizer, template, 60).prompt("Hé?")) for template in ("chat", "plain")]
    assert written == ["<user>Hé?<assistant>", "Hé?\n"]


@settings(max_examples=150, deadline=None)
@given(
    source=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    target=st.text(st.sampled_from("ab é😀"), max_size=8),
    max_length=st.integers(4, 60),
)
def test_the_target_stays_whole_and_a_cut_source_is_a_prefix(tokenizer, source, target, max_length):
    encoder = Encoder(tokenizer, "plain", max_length)
    whole = len(source.encode()) + 1 + len(target.encode())
    try:
        example, cut = encoder.encode(Pair(source, target))
    except UserError:
        assert whole > max_length < len(target.encode()) + 2, "refused though a byte of the source has room"
        return
    assert cut == (whole > max_length)
    assert len(example.tokens) <= max_length
    assert example.targets.tolist() == encoder.target(target)
    prompt = tokenizer.decode(example.tokens[: example.predict[0] + 1])
    assert prompt.endswith("\n")
    if cut:
        assert source.encode().startswith(prompt[:-1].encode())
    else:
        assert prompt[:-1] == source
        assert len(example.tokens) == whole


def test_cutting_takes_no_more_than_it_must(encoder):
    (example,), count = encoder.encode_all([Pair("x" * 100, "Miso")])
    assert count == 1
    assert len(example.tokens) == encoder.max_length
    assert encoder.tokenizer.decode(example.targets) == "Miso</s>"


def test_a_character_cut_in_two_is_left_out(tokenizer):
    for max_length in (20, 21, 22, 23):
        example, cut = Encoder(tokenizer, "plain", max_length).encode(Pair("😀" * 10, "ok"))
        assert cut
        text = tokenizer.decode(example.tokens)
        assert text == "😀" * ((max_length - 3) // 4) + "\nok"


def test_cuts_are_counted_and_the_order_kept(encoder):
    pairs = [Pair("long " * 30, "a"), PAIR, Pair("longer " * 30, "b")]
    examples, cut = encoder.encode_all(pairs)
    assert cut == 2
    assert [encoder.tokenizer.decode(example.targets) for example in examples] == ["a</s>", "Miso</s>", "b</s>"]


def test_a_target_without_room_for_a_prompt_is_refused_by_row(encoder):
    with pytest.raises(UserError, match=r"^rows\.jsonl, line 3: the target has 81 tokens.*max_length=60"):
        encoder.encode(dataclasses.replace(PAIR, target="y" * 80))


def test_no_chat_template_or_no_eos_or_an_unknown_template_is_refused(tiny_backbone_directory):
    bare = load_tokenizer(tiny_backbone_directory)
    bare.chat_template = None
    Encoder(bare, "plain", 60)
    with pytest.raises(UserError, match=r"no chat template: set data\.template=plain"):
        Encoder(bare, "chat", 60)
    with pytest.raises(UserError, match="'jinja'; choices are chat, plain"):
        Encoder(bare, "jinja", 60)
    bare.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Encoder(bare, "plain", 60)


def test_the_digest_identifies_the_content():
    def make(*parts):
        return Example(*(np.array(part, np.int32) for part in parts))

    same = make([1, 2, 3], [1, 2], [3, 4]).digest
    assert same == make([1, 2, 3], [1, 2], [3, 4]).digest
    others = [
        make([1, 2, 9], [1, 2], [3, 4]),
        make([1, 2, 3], [0, 2], [3, 4]),
        make([1, 2, 3], [1, 2], [3, 9]),
        make([1, 2], [3, 1], [2, 3, 4]),
        make([1, 2], [3, 1, 2], [3, 4]),
    ]
    assert len({same, *(example.digest for example in others)}) == 6


def test_smollm2_prompts_are_its_chat_format(smollm2):
    encoder = Encoder(smollm2.tokenizer, "chat", 512)
    turn = [{"role": "user", "content": PAIR.source}]
    judge = smollm2.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoder.prompt(PAIR.source) == judge
    example, _ = encoder.encode(PAIR)
    text = smollm2.tokenizer.decode(example.tokens)
    assert text.endswith("<|im_start|>user\nWhat is my cat called?<|im_end|>\n<|im_start|>assistant\nMiso")
    assert smollm2.tokenizer.decode(example.targets) == "Miso<|im_end|>"
    assert example.targets[-1] in smollm2.eos_ids
