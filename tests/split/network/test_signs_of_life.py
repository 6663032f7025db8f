"""What a device hears of a cloud that compiles, is slow, or generates by itself."""

import asyncio
import dataclasses
import threading
import time
import types

import pytest
from streams import run

from spa_jax.decoding.beam import Beams
from spa_jax.engine.programs import MAX_STEPS
from spa_jax.split import server, server_session, waiting
from spa_jax.split.client import DeviceClient, generate
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.messages_pb2 import FromCloud
from spa_jax.split.refusals import CloudGone
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud

PROMPT, SILENCE = "What is thing 1?", 0.8


@pytest.fixture
def signs(monkeypatch):
    """Sets how often a sign of life is due."""

    def due_every(seconds):
        for module in (server, server_session):
            monkeypatch.setattr(module, "SIGN_EVERY", seconds)

    return due_every


def slow(function, seconds):
    def run_slowly(*arguments):
        time.sleep(seconds)
        return function(*arguments)

    return run_slowly


def ask(cloud, plugin, request, on_progress=None, on_wait=None, **connection):
    return run(
        cloud,
        lambda port: generate(
            Connection(f"127.0.0.1:{port}", **connection), plugin, request, on_progress, on_wait=on_wait
        ),
    )


@pytest.mark.parametrize("where", ["plan", "begin", "turn"])
@pytest.mark.parametrize("tells", [True, False])
def test_a_cloud_that_is_busy_and_says_so_is_not_taken_for_dead(where, tells, cloud, plugin, signs, monkeypatch):
    """As with a program that compiles. While the device hears signs of life, its clock goes on with them alone."""
    signs(SILENCE / 2 if tells else 600)
    request = open_message(plugin, [PROMPT], 1, setting="base")
    here = in_process(cloud, plugin, request)
    owner = cloud.engine if where == "turn" else cloud
    work, handle, is_over, now = getattr(owner, where), DeviceClient.handle_message, threading.Event(), [0.0]

    def busy(*arguments):
        assert is_over.wait(600)
        return work(*arguments)

    def heard(client, data):
        if FromCloud.FromString(data).HasField("working") and not is_over.is_set():
            now[0] += SILENCE / 2
            if now[0] > 1.8 * SILENCE:
                is_over.set()
        return handle(client, data)

    async def scenario(port):
        try:
            return await generate(Connection(f"127.0.0.1:{port}", silence=SILENCE), plugin, request)
        finally:
            is_over.set()

    monkeypatch.setattr(owner, where, busy)
    if tells:
        monkeypatch.setattr(DeviceClient, "handle_message", heard)
        monkeypatch.setattr(waiting, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
        assert run(cloud, scenario).generations == here.generations
    else:
        with pytest.raises(CloudGone, match="has said nothing for"):
            run(cloud, scenario)


def test_a_device_that_stood_still_itself_does_not_blame_the_cloud(backbone, plugin, signs, monkeypatch):
    """As after Ctrl-Z: all that came meanwhile is still to be read."""
    signs(0.1)
    cloud = Cloud(dataclasses.replace(backbone, eos_ids=()))
    request, seen = open_message(plugin, [PROMPT], 30, setting="base"), []
    here = in_process(cloud, plugin, request)
    monkeypatch.setattr(cloud.engine, "turn", slow(cloud.engine.turn, 0.3))

    def stand_still(progress):
        if not seen:
            time.sleep(2.5)
        seen.append(progress)

    assert ask(cloud, plugin, request, stand_still, silence=2.0).generations == here.generations


def test_a_search_tells_how_far_it_is(cloud, plugin, signs, monkeypatch):
    signs(0.05)
    monkeypatch.setattr(cloud.engine, "turn", slow(cloud.engine.turn, 0.1))
    monkeypatch.setattr(waiting, "TELL_EVERY", 0.05)
    waits, heard = [], []
    request = open_message(plugin, [PROMPT], 40, setting="base", beams=Beams(2))
    result = ask(cloud, plugin, request, heard.append, waits.append, silence=60.0)
    assert [len(progress.generated[0].tokens) for progress in heard] == [len(result.generations[0].tokens)]
    assert any("so far" in wait for wait in waits), waits


def test_a_generation_without_a_question_comes_as_its_tokens_come(backbone, plugin, monkeypatch):
    cloud = Cloud(dataclasses.replace(backbone, eos_ids=()))
    turn, came = cloud.engine.turn, []

    def follow():
        """Goes on when all that was generated before has come."""
        latest = time.monotonic() + 60
        while sum(group.generated for group in cloud.engine._groups) > max(came, default=0):
            assert time.monotonic() < latest
            time.sleep(0.005)
        return turn()

    monkeypatch.setattr(cloud.engine, "turn", follow)
    ask(
        cloud, plugin, open_message(plugin, [PROMPT], 60, setting="base"),
        lambda progress: came.append(len(progress.generated[0].tokens)),
    )  # fmt: skip
    assert came[-1] == 60
    assert max(after - before for before, after in zip([0, *came], came)) <= MAX_STEPS


def test_a_device_says_what_it_waits_for(plugin, monkeypatch):
    monkeypatch.setattr(waiting, "TELL_EVERY", 0.1)
    waits = []
    request = open_message(plugin, [PROMPT], 1)

    async def scenario():
        nobody = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
        async with nobody:
            address = f"127.0.0.1:{nobody.sockets[0].getsockname()[1]}"
            await generate(Connection(address, silence=2.0), plugin, request, on_wait=waits.append)

    with pytest.raises(CloudGone, match=r"cannot reach the cloud at 127.0.0.1:\d+ \(it has said nothing for \d s\)"):
        asyncio.run(scenario())
    assert waits
    assert all(wait.startswith("connecting to the cloud at 127.0.0.1:") for wait in waits)
