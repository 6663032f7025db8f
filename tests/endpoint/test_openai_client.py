"""The endpoint of a device as OpenAI's own client meets it; judge: the same generation in one process."""

import asyncio
import math

import httpx2
import openai
import pytest
from endpoints import NEW, cloud_in_thread, endpoint_in_thread, shown_at_questions

from spa_jax.conversation import Beginning, Conversation
from spa_jax.decoding.sampling import Penalties, Sampling
from spa_jax.endpoint.app import Endpoint
from spa_jax.endpoint.requests import Defaults
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud

QUESTION = "What is thing 1?"
MESSAGES = [{"role": "user", "content": QUESTION}]
TALK = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "thing 1?"}]},
    {"role": "assistant", "content": "A </s> cat"},
    {"role": "user", "content": "And thing 2?"},
]


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def judge(cloud, plugins, backbone):
    """Generates in one process; returns generations and texts."""

    def judge(prompts=QUESTION, model="mine", new=NEW, **how):
        prompts = prompts if isinstance(prompts, list) else [prompts]
        made = generate(cloud, plugins[model], open_message(plugins[model], prompts, new, **how)).generations
        return made, [backbone.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in made]

    return judge


def sources(spa_tokens):
    return [token["source"] == "device" for token in spa_tokens]


@pytest.mark.parametrize("model", ["mine", "inner"])
def test_a_whole_answer_is_that_of_generate(model, client, judge):
    answer = client.chat.completions.create(model=model, messages=MESSAGES, logprobs=True)
    (made,), (text,) = judge(model=model, scored=True)
    (choice,) = answer.choices
    assert choice.message.content == text
    assert choice.finish_reason == ("length" if len(made.tokens) == NEW else "stop")
    assert answer.usage.completion_tokens == len(made.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(made.tokens)
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(made.logprobs, abs=1e-4)
    assert "".join(token.token for token in choice.logprobs.content) == text
    told = choice.spa["tokens"]
    assert "".join(token["text"] for token in told) == text
    assert sources(told) == made.consulted
    asked_later = made.consulted if model == "mine" else [False, *made.consulted[1:]]  # the first with the prompt
    assert [token["wait_ms"] > 0 for token in told] == asked_later
    if model == "mine":
        assert [token["p_consult"] for token in told] == pytest.approx(made.p_consult, abs=1e-5)
        assert 0 < sum(made.consulted) < len(made.consulted)
    else:
        assert {token["p_consult"] for token in told} == {None}
    assert answer.spa["exchanges"] == sum(asked_later)
    assert answer.spa["consulted_share"] == pytest.approx(made.consulted_share)
    assert answer.spa["degraded"] == 0


def test_a_streamed_answer_is_the_whole_one_piece_by_piece(client, judge, request):
    (made,), (text,) = judge()
    (whole,) = client.chat.completions.create(model="mine", messages=MESSAGES).choices
    awaited = shown_at_questions([(token["text"], token["source"]) for token in whole.spa["tokens"]])
    how = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    replies, parts, shown = request.getfixturevalue("replies"), [], 0
    for part in client.chat.completions.create(model="mine", messages=MESSAGES, **how):
        parts.append(part)
        shown += sum(len(getattr(choice, "spa", {"tokens": []})["tokens"]) for choice in part.choices)
        while awaited and shown == awaited[0]:  # all that is there before the device answers
            awaited.pop(0)
            replies.release()
    assert not awaited
    with_choices = [part for part in parts if part.choices]
    deltas = [part.choices[0].delta.content or "" for part in with_choices]
    assert "".join(deltas) == text
    assert sum(bool(delta) for delta in deltas) > 3
    assert with_choices[0].choices[0].delta.role == "assistant"
    told = [token for part in with_choices for token in getattr(part.choices[0], "spa", {"tokens": []})["tokens"]]
    assert sources(told) == made.consulted
    scored = [token for part in with_choices if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
    assert len(scored) == len(made.tokens)
    assert with_choices[-1].choices[0].finish_reason == ("length" if len(made.tokens) == NEW else "stop")
    assert {part.id for part in parts} == {parts[0].id}
    assert parts[-1].usage.completion_tokens == len(made.tokens)
    assert with_choices[-1].spa["exchanges"] == sum(made.consulted)


def test_ten_conversations_at_once_are_ten_alone(url, judge):
    questions = [f"What is thing {number}?" for number in range(10)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def ask(question):
                messages = [{"role": "user", "content": question}]
                stream = await client.chat.completions.create(model="mine", messages=messages, stream=True)
                return "".join([part.choices[0].delta.content or "" async for part in stream])

            return await asyncio.gather(*map(ask, questions))

    assert asyncio.run(ask_all()) == [judge(question)[1][0] for question in questions]


def test_a_conversation_is_what_its_tokens_are(client, judge):
    talk = Conversation().told("Be brief.").asked(QUESTION).answered("A </s> cat").asked("And thing 2?")
    (made,), (text,) = judge(talk)
    answer = client.chat.completions.create(model="mine", messages=TALK)
    assert answer.choices[0].message.content == text
    assert answer.usage.completion_tokens == len(made.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_wherever_tokens_end(stream, client, judge):
    _, (text,) = judge()
    stop = text[5:8]  # of several tokens, which are bytes
    answer = client.chat.completions.create(model="mine", messages=MESSAGES, stop=[stop, "@@@"], stream=stream)
    if stream:
        parts = [part.choices[0] for part in answer if part.choices]
        said, reason = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
    else:
        said, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert said == text[: text.index(stop)]
    assert reason == "stop"


def test_choices_seed_temperature_and_penalties_are_those_of_generate(client, judge):
    penalties = {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    answer = client.chat.completions.create(
        model="mine", messages=MESSAGES, n=3, temperature=0.9, top_p=0.8, seed=5, max_completion_tokens=12, **penalties
    )
    sampling = Sampling(0.9, 0, 0.8)
    _, texts = judge([QUESTION] * 3, new=12, sampling=sampling, seed=5, penalties=Penalties(0.5, 0.25))
    assert [choice.message.content for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    alone = client.chat.completions.create(model="mine", messages=MESSAGES, max_tokens=12)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens


def test_a_null_is_as_good_as_nothing(url):
    given = {"model": "mine", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    names = ("max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "logprobs", "spa", "tools", "suffix")
    inside = {"stream_options": {"include_usage": None}, "spa": {"network_ms": None, "setting": None}}
    for body in (given | dict.fromkeys(names), given | inside):
        response = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n")


def test_an_event_is_a_line_for_every_client():
    from spa_jax.endpoint.app import _event

    assert len(_event({"text": "\u2028\x85\x0c\u2029\n"}).splitlines()) == 2


def test_our_own_fields_choose_setting_threshold_and_a_slow_network(client, judge):
    def ask(**spa):
        return client.chat.completions.create(model="mine", messages=MESSAGES, extra_body={"spa": spa})

    for how in ({"setting": "s1"}, {"threshold": 0.9}, {"setting": "base"}):
        answer = ask(**how)
        (made,), (text,) = judge(**how)
        assert answer.choices[0].message.content == text
        assert sources(answer.choices[0].spa["tokens"]) == made.consulted
    waits = [token["wait_ms"] for token in ask(network_ms=40).choices[0].spa["tokens"] if token["source"] == "device"]
    assert min(waits) >= 40


def test_base_is_the_backbone_alone(client, judge):
    answer = client.chat.completions.create(model="base", messages=MESSAGES)
    assert answer.choices[0].message.content == judge(setting="base")[1][0]
    assert answer.spa["exchanges"] == 0


def test_texts_are_continued_as_they_are(client, judge, backbone):
    prompts = ["Once upon", "There was </s>"]
    answer = client.completions.create(model="mine", prompt=prompts, logprobs=0, max_tokens=9)
    made, texts = judge([Beginning(prompt) for prompt in prompts], new=9, scored=True)
    assert [choice.text for choice in answer.choices] == texts
    for choice, each in zip(answer.choices, made):
        assert choice.logprobs.token_logprobs == pytest.approx(each.logprobs, abs=1e-4)
        assert choice.logprobs.text_offset[0] == 0
    ids = backbone.tokenizer(prompts[0])["input_ids"]
    answer = client.completions.create(model="mine", prompt=ids, max_tokens=9, n=2)
    assert [choice.text for choice in answer.choices] == [texts[0]] * 2
    streamed = client.completions.create(model="mine", prompt=prompts[0], max_tokens=9, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == texts[0]


REFUSED = {
    "no question": ({"messages": [{"role": "assistant", "content": "x"}]}, "ends in the user's turn"),
    "empty": ({"messages": []}, "messages: List should have at least 1 item"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    "hot": ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
    "top": ({"logprobs": True, "top_logprobs": 3}, "top_logprobs is not supported"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    "bias": ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
    "long": ({"max_tokens": 10_000}, "do not fit the backbone's context"),
    "no tokens": ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    "stop": ({"stop": [""]}, "by no empty one"),
    "setting": ({"extra_body": {"spa": {"setting": "s3"}}}, "a plugin trained as 'spa' cannot run as 's3'"),
    "long text": ({"n": 16, "messages": [{"role": "user", "content": "x" * 600_000}]}, "the request has 9,6.* bytes"),
    "unknown": ({"extra_body": {"spa": {"colour": 1}}}, "spa.colour: Extra inputs are not permitted"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_makes_no_sense_is_400_and_says_why(case, stream, client):
    changed, reason = REFUSED[case]
    with pytest.raises(openai.BadRequestError, match=reason):
        client.chat.completions.create(**{"model": "mine", "messages": MESSAGES, "stream": stream, **changed})


SURROGATE = rb'{"model": "mine", "messages": [{"role": "user", "content": "hi \ud83d"}]}'


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": "mine"}', b'{"model": 1, "messages": []}', b"\xff{}", SURROGATE]
)
def test_a_body_that_is_no_request_is_400(body, url):
    response = httpx2.post(f"{url}/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_models_are_named(client, plugins):
    assert [model.id for model in client.models.list()] == ["mine", "inner", "base"]
    assert client.models.retrieve("mine").spa["setting"] == "spa"
    for ask in (
        lambda: client.models.retrieve("other"),
        lambda: client.chat.completions.create(model="other", messages=MESSAGES),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'; models are mine, inner, base"):
            ask()


def test_only_who_has_the_key_is_answered(server, plugins):
    endpoint = Endpoint(plugins, Connection(f"127.0.0.1:{server[0]}"), Defaults(NEW), key="secret")
    with endpoint_in_thread(endpoint) as (url, _):
        good, bad = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("secret", "guess"))
        assert next(iter(good.models.list())).id == "mine"
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            bad.chat.completions.create(model="mine", messages=MESSAGES)


def test_another_sites_page_is_not_answered(url):
    body = {"model": "mine", "messages": MESSAGES}
    for origin, status in (("https://evil.example", 403), ("null", 403), (url, 200)):
        response = httpx2.post(f"{url}/v1/chat/completions", json=body, headers={"Origin": origin}, timeout=60)
        assert response.status_code == status


def test_a_cloud_that_dies_midway_is_an_error_after_what_was_there(backbone, plugins):
    with cloud_in_thread(Cloud(backbone)) as ((port, _), end):
        connection = Connection(f"127.0.0.1:{port}", patience=0.5)
        with endpoint_in_thread(Endpoint(plugins, connection, Defaults(60))) as (url, _):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            spa, said = {"network_ms": 150}, ""
            stream = client.chat.completions.create(
                model="inner", messages=MESSAGES, stream=True, extra_body={"spa": spa}
            )
            parts = iter(stream)
            while len(said) < 3:
                said += next(parts).choices[0].delta.content or ""
            end()
            with pytest.raises(openai.APIError, match="the cloud"):
                list(parts)
            with pytest.raises(openai.APIStatusError) as caught:
                client.chat.completions.create(model="inner", messages=MESSAGES)
            assert caught.value.status_code == 502


def test_who_leaves_ends_the_generation(url, server):
    (_, cloud_server), body = server, {"model": "inner", "messages": MESSAGES, "stream": True}
    body["spa"] = {"network_ms": 100}
    running = lambda: sum(session.is_running for session in list(cloud_server._sessions._by_name.values()))  # noqa: E731
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        next(line for line in response.iter_lines() if '"spa"' in line)
        assert running() == 1
    whole = {**body, "stream": False}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}/v1/chat/completions", json=whole, timeout=httpx2.Timeout(60, read=0.3))

    async def wait():
        for _ in range(1200):
            if not running():
                return True
            await asyncio.sleep(0.05)
        return False

    assert asyncio.run(wait())


def test_numbers_that_json_does_not_have_are_null():
    from spa_jax.endpoint.requests import finite

    assert finite([1.0, math.nan, -math.inf]) == [1.0, None, None]
