"""Chat templates: what they write, where an answer ends, and every way that they can fail."""

import datetime

import pytest
from transformers.utils import chat_template_utils

from spa_jax import chat
from spa_jax.data.encoding import Encoder
from spa_jax.errors import UserError
from spa_jax.weights.huggingface import load_tokenizer

TURN = [{"role": "user", "content": "Hi"}]
DATED = (
    "{{ strftime_now('%d %b %Y') }}|{{ strftime_now( \"%Y-%m-%d\" ) }}|"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
LLAMA3 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}Today Date: {{ date_string }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_backbone_directory):
    return load_tokenizer(tiny_backbone_directory)


BROKEN = {
    "named": ({"tool_use": "{{ messages }}", "rag": "{{ messages }}"}, "multiple chat templates with no default"),
    "raises": ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    "syntax": ("{% for m in messages %}", "Unexpected end of template"),
    "undefined": ("{{ messages[0].function.name }}", "undefined|no attribute"),
    "filter": ("{{ messages | to_yaml }}", "No filter named 'to_yaml'"),
    "test": ("{% if messages is jagged %}{% endif %}", "No test named 'jagged'"),
    "type": ("{{ messages + 1 }}", "concatenate|unsupported operand"),
    "zero": ("{{ 1 / 0 }}", "division by zero"),
    "loop": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "unsafe": ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    "alias": ("{% set now = strftime_now %}{{ now('%Y') }}", "a format that is not a constant"),
    "clock": ("{% set form = '%Y' %}{{ strftime_now(form) }}", "a format that is not a constant"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_template_that_fails_is_one_line_that_says_what_to_do(case, tokenizer):
    tokenizer.chat_template, says = BROKEN[case]
    with pytest.raises(
        UserError, match=rf"chat template cannot be used \(.*({says}).*\): set data\.template=plain"
    ) as no:
        Encoder(tokenizer, "chat", 60)
    assert "\n" not in str(no.value)
    assert Encoder(tokenizer, "plain", 60).prompt("Hi")


def test_a_template_that_fails_with_some_turns_alone_is_refused_there(tokenizer):
    tokenizer.chat_template = "{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}"
    with pytest.raises(UserError, match=r"\(no x\): set data\.template=plain"):
        Encoder(tokenizer, "chat", 60).prompt("x")


@pytest.mark.parametrize("template", [DATED, LLAMA3])
def test_the_date_is_the_one_that_is_given_and_not_todays(template, tokenizer, monkeypatch):
    tokenizer.chat_template = template
    assert chat.render(tokenizer, TURN, True) == chat.render(tokenizer, TURN, True, "2024-07-26")

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 9)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    # What transformers writes on the day itself.
    judged = tokenizer.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False)
    assert "09 May 2031" in judged
    assert chat.render(tokenizer, TURN, True, "2031-05-09") == judged
    assert "26 Jul 2024" in chat.render(tokenizer, TURN, True)
    assert Encoder(tokenizer, "chat", 60, date="2031-05-09").prompt("Hi") == tokenizer(judged)["input_ids"]


def test_only_a_chat_whose_template_writes_a_date_depends_on_it(tokenizer):
    assert not Encoder(tokenizer, "chat", 60).writes_date
    tokenizer.chat_template = DATED
    assert Encoder(tokenizer, "chat", 60).writes_date
    assert not Encoder(tokenizer, "plain", 60).writes_date


@pytest.mark.parametrize("date", ["today", "2024-13-01", "", "26 Jul 2024", "20240726"])
def test_what_is_no_date_is_refused(date, tokenizer):
    with pytest.raises(UserError, match=f"data.date is '{date}': write a date such as 2024-07-26"):
        Encoder(tokenizer, "chat", 60, date=date).prompt("Hi")


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("</s>", "</s>"),
        (" </s>\n", "</s>"),
        ("<|eot_id|>", "<|eot_id|>"),
        ("\n<|eot_id|></s>", "<|eot_id|>"),
        ("<|eot_id|>+", "<|eot_id|>"),
        ("", "</s>"),
        ("\nthe end", "</s>"),
        ("<no special token></s>", "</s>"),
    ],
)
def test_an_answer_ends_in_the_special_token_that_the_template_writes_after_it(after, end, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|eot"]})
    tokenizer.add_tokens(["<no special token>"])
    turn = "<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}" + after + "{% endif %}"
    begin = "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + begin
    expected = tokenizer.convert_tokens_to_ids(end)
    assert chat.end_of_answer(tokenizer, "chat") == expected
    assert Encoder(tokenizer, "chat", 60).target("x")[-1] == expected
    assert chat.end_of_answer(tokenizer, "plain") == Encoder(tokenizer, "plain", 60).end == tokenizer.eos_token_id
