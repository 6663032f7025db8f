"""Texts of a generation over gRPC: prompts that the cloud writes, and texts that end answers."""

import copy
import dataclasses

import pytest
from streams import run

from spa_jax.conversation import Conversation
from spa_jax.data.encoding import Encoder
from spa_jax.errors import UserError
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud

PROMPTS, NEW = ["What is thing 1?", "And thing 2, if you please?"], 10


def test_the_cloud_writes_the_date_that_the_plugin_was_trained_with(backbone, plugin):
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    cloud = Cloud(dataclasses.replace(backbone, tokenizer=tokenizer))
    for date in ("", "2024-07-26", "2031-05-09"):
        request = open_message(dataclasses.replace(plugin, date=date), ["Hi"], NEW)
        assert request.date == ("2031-05-09" if date == "2031-05-09" else "")
        assert cloud.plan(request).prompts == [Encoder(tokenizer, "chat", 128, date=date or "2024-07-26").prompt("Hi")]
    request.date = "a day"
    with pytest.raises(UserError, match="'a day': write a date such as 2024-07-26"):
        cloud.plan(request)


@pytest.mark.parametrize("setting", ["s1", "base"])
def test_an_answer_ends_in_front_of_a_text_that_ends_it(setting, plugin, cloud):
    def scenario_of(**how):
        seen = []

        async def scenario(port):
            request = open_message(plugin, PROMPTS, 40, setting=setting, scored=True, **how)
            return await generate(Connection(f"127.0.0.1:{port}"), plugin, request, seen.append)

        return run(cloud, scenario), seen

    whole, _ = scenario_of()
    stop = whole.texts[0][7:10]
    result, seen = scenario_of(stop=[stop, "never said"])
    at = whole.texts[0].index(stop)
    assert result.texts[0] == whole.texts[0][:at]
    assert [each.generated[0].stopped for each in seen][-1]
    for text, other, each, before in zip(result.texts, whole.texts, result.generations, whole.generations):
        assert text == other[: other.find(stop)] if stop in other else text == other
        assert len(each.tokens) == len(each.logprobs) <= len(before.tokens)
        assert each.tokens == before.tokens[: len(each.tokens)]
    assert len(result.generations[0].tokens) < len(whole.generations[0].tokens)
    shown = ["".join(each.generated[0].pieces) for each in seen]
    assert all(result.texts[0].startswith(text) for text in shown)


def test_in_one_process_an_answer_ends_there_too(plugin, cloud, backbone):
    whole = in_process(cloud, plugin, open_message(plugin, PROMPTS[:1], 40)).generations[0]
    text = backbone.tokenizer.decode(whole.tokens, skip_special_tokens=True)
    stopped = in_process(cloud, plugin, open_message(plugin, PROMPTS[:1], 40, stop=[text[7:10]])).generations[0]
    assert 0 < len(stopped.tokens) < len(whole.tokens)
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
    assert text[: text.index(text[7:10])].startswith(backbone.tokenizer.decode(stopped.tokens[:-1]))


@pytest.mark.parametrize("stop", [[""], ["a"] * 17, ["a" * 1025]], ids=["empty", "many", "long"])
def test_texts_that_end_answers_are_few_and_short(stop, plugin, cloud):
    with pytest.raises(UserError, match="an answer may be ended by at most 16 texts of 1024 characters together"):
        cloud.plan(open_message(plugin, PROMPTS, NEW, stop=stop))


def test_a_conversation_is_written_by_the_cloud(plugin, cloud, backbone):
    encoder = Encoder(backbone.tokenizer, "chat", 256)
    talk = Conversation().told("Be </s> brief.").asked("Who?").answered("I", encoder.target("I")).asked("<user>?")
    (prompt,) = cloud.plan(open_message(plugin, [talk], NEW)).prompts
    assert prompt == encoder.conversation(talk.turns)
    assert prompt.count(encoder.end) == 1
    (read,) = cloud.plan(open_message(plugin, [talk], NEW, reads_special=True)).prompts
    assert read.count(encoder.end) == 2
    with pytest.raises(UserError, match="a conversation ends in the user's turn that is to be answered"):
        cloud.plan(open_message(plugin, [talk.answered("x")], NEW))
    request = open_message(plugin, [talk], NEW)
    request.prompts[0].messages[0].role = "tool"
    with pytest.raises(UserError, match="a message has an unknown role: choices are system, user, assistant"):
        cloud.plan(request)
    request = open_message(plugin, [Conversation().asked("x" * 2**18)], NEW)
    with pytest.raises(UserError, match="are more than the cloud takes at once"):
        cloud.plan(request)
