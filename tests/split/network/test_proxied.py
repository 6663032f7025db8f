"""What a device tells a proxy in front of several clouds, and what becomes of it if another cloud answers."""

import pytest
from streams import run, tokens_of
from test_lines import NEW, PROMPTS, Relay

from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import PREFIX_HEADER
from spa_jax.split.refusals import SessionLost
from spa_jax.split.request import PREFIX_CHARACTERS, PREFIX_TOKENS, open_message, prefix_digest
from spa_jax.split.server import Server

COOKIES = ["replica=a1; path=/", "other=b", "b@d=no name of a cookie", *(f"more{n}=c" for n in range(99))]


@pytest.fixture
def streams(monkeypatch):
    """The streams that came to a server behind something that sets cookies: (server, metadata)."""
    seen, serve = [], Server.generate

    async def generate_behind_proxy(self, requests, context):
        seen.append((self, dict(context.invocation_metadata())))
        await context.send_initial_metadata([("set-cookie", cookie) for cookie in COOKIES])
        await serve(self, requests, context)

    monkeypatch.setattr(Server, "generate", generate_behind_proxy)
    return seen


def generate_over_broken_line(cloud, plugin, request, seen, when_cut=lambda: None):
    """The line breaks when a few tokens are seen; returns the result."""

    async def scenario(port):
        async with Relay(port) as relay:

            def watch(progress):
                seen.append(tokens_of(progress))
                if len(seen) == 3:
                    when_cut()
                    relay.cut()

            return await generate(Connection(relay.address), plugin, request, watch)

    return run(cloud, scenario)


def test_a_device_that_comes_back_is_known_by_its_prefix_and_cookies(cloud, plugin, streams):
    request = open_message(plugin, PROMPTS, NEW)
    here = in_process(cloud, plugin, request)
    there = generate_over_broken_line(cloud, plugin, request, [])
    assert there.generations == here.generations
    (_, first), *others = streams
    assert "cookie" not in first
    assert others
    assert {metadata["cookie"] for _, metadata in others} == {"replica=a1; other=b; more0=c; more1=c"}
    assert {metadata[PREFIX_HEADER] for _, metadata in streams} == {prefix_digest(request)}


def test_a_device_whose_session_is_gone_has_its_tokens_so_far(cloud, plugin, streams):
    seen = []

    def end_sessions():
        streams[0][0]._sessions.end_unknown(lambda token: False)

    with pytest.raises(SessionLost, match=r"unknown-session.*generate again") as lost:
        generate_over_broken_line(cloud, plugin, open_message(plugin, PROMPTS, NEW), seen, end_sessions)
    assert [each.tokens for each in lost.value.generations] == seen[-1]
    assert all(seen[-1])


@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_prompts_that_begin_alike_have_one_digest(unit, plugin):
    length = {"characters": PREFIX_CHARACTERS, "tokens": PREFIX_TOKENS}[unit]

    def digest(begin, end, *others):
        prompt = begin + end if unit == "characters" else list((begin + end).encode())
        return prefix_digest(open_message(plugin, [prompt, *others], NEW))

    begin = "x" * length
    assert digest(begin, "one") == digest(begin, "another", "and more")
    assert digest(begin[1:], "y") != digest(begin, "")
    digests = [digest(str(n), "") for n in range(200)]
    assert {len(each) for each in digests} == {4}
    assert len(set(digests)) > 190
