"""Prompts and targets as tokens: what predicts what, and what is cut."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_jax.data.encoding import Encoder, Example
from spa_jax.data.pairs import Pair
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
    with pytest.raises(
        UserError,
        match=r"^rows\.jsonl, line 3: the target has 81 tokens.*data\.max_length=60; .* raise data\.max_length$",
    ):
        encoder.encode(dataclasses.replace(PAIR, target="y" * 80))


TALK = dataclasses.replace(PAIR, later=(Pair("And my dog?", "Rex"), Pair("How old is he?", "7")))


def test_every_answer_of_a_conversation_is_a_target_and_each_prompt_begins_the_next(encoder):
    encoder = dataclasses.replace(encoder, max_length=120)
    example, cut = encoder.encode(TALK)
    assert not cut
    assert encoder.tokenizer.decode(example.targets) == "Miso</s>Rex</s>7</s>"
    assert [len(prompt) for prompt in example.prompts] == [int(example.predict[i]) + 1 for i in (0, 5, 9)]
    assert example.prompts[0] == encoder.prompt(PAIR.source)
    for prompt, more in zip(example.prompts, [*example.prompts[1:], example.tokens.tolist()]):
        assert more[: len(prompt)] == prompt
    inside = np.isin(np.arange(len(example.tokens)), example.predict)
    following = np.append(example.tokens[1:], example.targets[-1])
    assert following[inside].tolist() == example.targets.tolist()


def test_a_conversation_reads_as_its_template_writes_it(tokenizer):
    written = [tokenizer.decode(Encoder(tokenizer, kind, 120).encode(TALK)[0].tokens) for kind in ("chat", "plain")]
    assert written == [
        "<user>What is my cat called?<assistant>Miso</s><user>And my dog?<assistant>Rex</s><user>How old is he?"
        "<assistant>7",
        "What is my cat called?\nMiso</s>And my dog?\nRex</s>How old is he?\n7",
    ]


def test_of_a_conversation_only_the_first_source_is_cut(encoder):
    example, cut = encoder.encode(dataclasses.replace(TALK, source="x" * 100))
    assert cut
    assert len(example.tokens) == encoder.max_length
    assert encoder.tokenizer.decode(example.targets) == "Miso</s>Rex</s>7</s>"
    with pytest.raises(UserError, match=r"^rows\.jsonl, line 3: the later turns have \d+ tokens"):
        dataclasses.replace(encoder, max_length=30).encode(TALK)


def test_with_room_for_the_target_what_is_cut_does_not_tell_how_long_it_is(tokenizer):
    encoder = Encoder(tokenizer, "plain", 60, target_room=20)
    short, middling = (encoder.encode(Pair("x" * 100, "y" * count))[0] for count in (1, 20))
    assert short.prompts == middling.prompts
    assert len(short.prompts[0]) == 40
    (longer,) = encoder.encode(Pair("x" * 100, "y" * 30))[0].prompts
    assert len(longer) == 30


def test_a_chat_template_that_ends_answers_otherwise_is_refused(tiny_backbone_directory):
    odd = load_tokenizer(tiny_backbone_directory)
    odd.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    assert Encoder(odd, "chat", 60).encode(PAIR)[0].predict.size
    with pytest.raises(UserError, match="does not end an answer with </s>"):
        Encoder(odd, "chat", 120).encode(TALK)


def test_answers_end_in_the_token_that_the_template_ends_them_with(tiny_backbone_directory):
    tokenizer = load_tokenizer(tiny_backbone_directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<|eot_id|>")
    encoder = Encoder(tokenizer, "chat", 120)
    example, _ = encoder.encode(TALK)
    assert tokenizer.decode(example.targets) == "Miso<|eot_id|>Rex<|eot_id|>7<|eot_id|>"
    turns = [{"role": role, "content": text} for turn in TALK.turns for role, text in
             (("user", turn.source), ("assistant", turn.target))]  # fmt: skip
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert [*example.tokens, example.targets[-1]] == whole


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


def test_smollm2_prompts_are_its_chat_format(smollm2_without_weights):
    smollm2 = smollm2_without_weights
    encoder = Encoder(smollm2.tokenizer, "chat", 512)
    turn = [{"role": "user", "content": PAIR.source}]
    judge = smollm2.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoder.prompt(PAIR.source) == judge
    example, _ = encoder.encode(PAIR)
    text = smollm2.tokenizer.decode(example.tokens)
    assert text.endswith("<|im_start|>user\nWhat is my cat called?<|im_end|>\n<|im_start|>assistant\nMiso")
    assert smollm2.tokenizer.decode(example.targets) == "Miso<|im_end|>"
    assert example.targets[-1] in smollm2.eos_ids


def test_smollm2_conversations_are_its_chat_format(smollm2_without_weights):
    tokenizer = smollm2_without_weights.tokenizer
    turns = [{"role": "user", "content": TALK.source}]
    for turn, before in zip(TALK.later, TALK.turns):
        turns += [{"role": "assistant", "content": before.target}, {"role": "user", "content": turn.source}]
    judge = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert Encoder(tokenizer, "chat", 512).encode(TALK)[0].prompts[-1] == judge
