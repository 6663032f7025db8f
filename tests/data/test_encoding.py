"""Prompts and targets as tokens: what predicts what, and what is cut."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_jax.data.encoding import Encoder, Example
from spa_jax.data.pairs import Pair, Turn
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


@settings(max_examples=150)
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


SYSTEM = Turn("system", "Be brief. ")
LONG_TALK = dataclasses.replace(
    TALK,
    context=(SYSTEM, Turn("assistant", "Hello!")),
    later=(
        dataclasses.replace(TALK.later[0], learnt=False, context=(Turn("user", "Wait."),)),
        dataclasses.replace(TALK.later[1], context=(Turn("system", "Answer in figures."),)),
    ),
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""The tiny backbone's template with what transformers masks answers by."""


def messages(pair):
    """The messages that transformers is given, each with whether it is learnt."""
    return [
        ({"role": role, "content": content}, learnt)
        for turn in pair.turns
        for role, content, learnt in (
            *((*other, False) for other in turn.context),
            ("user", turn.source, False),
            ("assistant", turn.target, turn.learnt),
        )
    ]


@pytest.mark.parametrize("pair", [PAIR, TALK, LONG_TALK, dataclasses.replace(TALK, learnt=False)])
def test_targets_are_what_transformers_masks_as_answers_without_those_not_to_learn(pair, tokenizer):
    whole, answers = [], []
    for end, (_, learnt) in enumerate(messages(pair), start=1):
        turns = [message for message, _ in messages(pair)[:end]]
        judged = tokenizer.apply_chat_template(
            turns, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        new = judged["assistant_masks"][len(whole) :]
        answers += [len(whole) + i for i, mask in enumerate(new) if mask and learnt]
        whole = judged["input_ids"]
    example, cut = Encoder(tokenizer, "chat", 200).encode(pair)
    assert not cut
    assert example.tokens.tolist() == whole[:-1]
    assert (example.predict + 1).tolist() == answers
    assert example.targets.tolist() == [whole[i] for i in answers]


def test_plain_conversations_have_their_context_as_lines(tokenizer):
    example, _ = Encoder(tokenizer, "plain", 200).encode(LONG_TALK)
    assert tokenizer.decode(example.tokens) == (
        "Be brief. \nHello!</s>What is my cat called?\nMiso</s>Wait.\nAnd my dog?\nRex</s>"
        "Answer in figures.\nHow old is he?\n7"
    )
    assert tokenizer.decode(example.targets) == "Miso</s>7</s>"
    assert [len(prompt) for prompt in example.prompts] == [int(example.predict[i]) + 1 for i in (0, 5)]


def test_the_context_of_a_source_that_is_cut_stays_whole(encoder):
    example, cut = encoder.encode(Pair("x" * 100, "Miso", context=(SYSTEM,)))
    assert cut
    assert len(example.tokens) == encoder.max_length
    assert "Be brief. " in encoder.tokenizer.decode(example.tokens)


SYSTEMLESS = {
    "raises": ("{{ raise_exception('no system role') if messages[0].role == 'system' }}", "no system role"),
    "ignores": ("{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}", "does not write system"),
    "moves": (
        "{% if messages[0].role == 'system' %}{% set moved = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}",
        "does not end an answer with </s> and go on",
    ),
}


@pytest.mark.parametrize("case", SYSTEMLESS)
def test_a_template_without_system_turns_is_refused_where_a_row_has_one(case, tiny_backbone_directory):
    """One that moves them to the last question, as Mistral's does, would write no two answers after the same text."""
    begin, message = SYSTEMLESS[case]
    odd = load_tokenizer(tiny_backbone_directory)
    odd.chat_template = begin + (
        "{% for m in messages %}<{{ m.role }}>{{ moved if moved is defined and loop.last }}{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoder = Encoder(odd, "chat", 200)
    assert encoder.encode(TALK)[0].prompts
    with pytest.raises(UserError, match=rf"{message}.*set data\.template=plain"):
        encoder.encode(dataclasses.replace(TALK, context=(SYSTEM,)))


QUESTIONLESS = {
    "parts": "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
    "constant": "Answer the question.",
    "capitals": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "first turn": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("case", QUESTIONLESS)
def test_a_template_that_does_not_write_the_question_is_refused(case, tiny_backbone_directory):
    odd = load_tokenizer(tiny_backbone_directory)
    odd.chat_template = QUESTIONLESS[case]
    context = (SYSTEM,) if case == "first turn" else ()
    with pytest.raises(UserError, match=r"does not write a question as it is: set data\.template=plain"):
        Encoder(odd, "chat", 60).prompt("Who?", context)


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


@pytest.mark.parametrize("pair", [TALK, LONG_TALK])
def test_smollm2_conversations_are_its_chat_format(pair, smollm2_without_weights):
    tokenizer = smollm2_without_weights.tokenizer
    turns = [message for message, _ in messages(pair)]
    judge = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    example, _ = Encoder(tokenizer, "chat", 512).encode(pair)
    assert example.prompts[-1] == judge
    judge = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert example.tokens.tolist() == judge[: len(example.tokens)]
    assert tokenizer.decode(judge[len(example.tokens) :]) == "<|im_end|>\n"
