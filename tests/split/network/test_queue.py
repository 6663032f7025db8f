"""Devices that come where there is no room wait for it, are told their place, and lose it when they go."""

import asyncio

import pytest
from streams import Stream, connected, metric, run

from spa_jax.errors import UserError
from spa_jax.split import waiting
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.messages_pb2 import Cancel, FromDevice
from spa_jax.split.request import open_message
from spa_jax.split.server import Limits

PROMPTS, NEW = ["What is thing 1?"], 4


@pytest.fixture(scope="module")
def request_(plugin):
    return open_message(plugin, PROMPTS, NEW)


def test_a_device_waits_for_room_and_is_told_its_place(cloud, plugin, request_, caplog, monkeypatch):
    monkeypatch.setattr(waiting, "TELL_EVERY", 600)  # nothing is told before the place
    here, waits = in_process(cloud, plugin, request_), []

    async def scenario(port):
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_))
            assert (await first.receive()).HasField("opened")
            connection = Connection(f"127.0.0.1:{port}")
            task = asyncio.create_task(generate(connection, plugin, request_, on_wait=waits.append))
            while "number 1 in its queue" not in caplog.text:
                await asyncio.sleep(0.01)
            second = Stream(channel, FromDevice(open=request_))
            assert (await second.receive()).queued.place == 2
            second.call.cancel()
            first.send(FromDevice(cancel=Cancel()))
            return await task

    assert run(cloud, scenario, Limits(sessions=1, deadline=30)).generations == here.generations
    assert waits[0] == "number 1 in the cloud's queue: 0 s"


def test_a_device_in_the_queue_does_not_say_that_the_cloud_works_for_it(cloud, plugin, request_, monkeypatch):
    monkeypatch.setattr(waiting, "TELL_EVERY", 0.05)
    waits = []

    async def scenario(port):
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_))
            assert (await first.receive()).HasField("opened")
            task = asyncio.create_task(
                generate(Connection(f"127.0.0.1:{port}"), plugin, request_, on_wait=waits.append)
            )
            while sum("in the cloud's queue" in said for said in waits) < 3:
                await asyncio.sleep(0.01)
            task.cancel()
            begin = next(at for at, said in enumerate(waits) if "in the cloud's queue" in said)
            return {said.rpartition(":")[0] for said in waits[begin:]}

    assert run(cloud, scenario, Limits(sessions=1, deadline=30)) == {"number 1 in the cloud's queue"}


def test_a_device_waits_no_longer_than_its_user_says(cloud, plugin, request_):
    async def scenario(port):
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_))
            assert (await first.receive()).HasField("opened")
            with pytest.raises(UserError, match="the cloud is busy: after 0 s this is still number 1 in its queue"):
                await generate(Connection(f"127.0.0.1:{port}", queue_seconds=0), plugin, request_)

    run(cloud, scenario, Limits(sessions=1, deadline=30))


def test_the_cloud_lets_nobody_wait_for_ever(cloud, request_):
    async def scenario(port):
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_))
            assert (await first.receive()).HasField("opened")
            second = Stream(channel, FromDevice(open=request_))
            while (message := await second.receive()).HasField("queued"):
                assert message.queued.place == 1
            return message.refusal

    refusal = run(cloud, scenario, Limits(sessions=1, deadline=30, queue_seconds=0.2))
    assert (refusal.kind, "no room within 0.2 s" in refusal.reason) == ("overloaded", True)


def test_a_session_that_nobody_is_attached_to_gives_its_room_back(cloud, request_):
    async def scenario(port):
        before = metric("spa_sessions")
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_))
            assert (await first.receive()).HasField("opened")
        async with connected(port) as channel:
            second = Stream(channel, FromDevice(open=request_))
            while not (await second.receive()).HasField("opened"):
                pass
            second.send(FromDevice(cancel=Cancel()))
        while metric("spa_sessions") > before:
            await asyncio.sleep(0.01)

    run(cloud, scenario, Limits(sessions=1, deadline=60, abandoned=0.2))
