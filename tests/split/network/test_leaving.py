"""Whoever leaves takes no more than a call of the engine with it: a cancelled generation, or a cloud that stops."""

import asyncio
import gc
import threading
import time

import pytest
from streams import Stream, connected, metric, run

from spa_jax.engine.group import Group
from spa_jax.engine.schedule import Pace
from spa_jax.split.grpc_channel import ServerSecurity
from spa_jax.split.messages_pb2 import Cancel, FromDevice
from spa_jax.split.request import open_message
from spa_jax.split.server import Limits, Server, serving
from spa_jax.split.server_session import ServerSession
from spa_jax.split.session import Cloud, Session

SECONDS, NEW = 0.1, 60
"""Of a call of the engine, as with a large backbone; and tokens, each of which is one call."""
MOST = 6
"""Most calls that may follow: less than a second."""
HELD = 4
"""Calls, which are enough for a first token, after which the engine waits for what the cloud is to be told."""


@pytest.fixture
def goes_on():
    """Whether the engine may go on after its first calls."""
    return threading.Event()


@pytest.fixture
def calls(cloud, monkeypatch, goes_on):
    """The times of the engine's calls, each of one step."""
    turn, found = cloud.engine.turn, []

    def slow():
        if turn():
            found.append(time.monotonic())
            time.sleep(SECONDS)
            if len(found) == HELD:
                goes_on.wait(60)
            return True
        return False

    monkeypatch.setattr(Pace, "step", lambda *_: 1.0)
    monkeypatch.setattr(cloud.engine, "turn", slow)
    return found


@pytest.fixture
def counted(calls, goes_on, monkeypatch):
    """Lets the engine go on when a method of the cloud is called; gives (its object, the engine's calls then)."""

    def of(owner, name):
        method, found = getattr(owner, name), []

        def count(self, *arguments, **keywords):
            found.append((self, len(calls)))
            goes_on.set()
            return method(self, *arguments, **keywords)

        monkeypatch.setattr(owner, name, count)
        return found

    return of


@pytest.fixture
def long_request(plugin):
    return open_message(plugin, ["What is thing 1?"], NEW, setting="base")


async def begin(channel, request):
    """Opens a generation, which has said something when this returns."""
    stream = Stream(channel, FromDevice(open=request))
    while not (await stream.receive()).HasField("progress"):
        pass
    return stream


def test_a_cancelled_generation_ends_at_once(cloud, calls, counted, long_request):
    cancelled = counted(ServerSession, "cancel")

    async def scenario(port):
        before = metric("spa_sessions")
        async with connected(port) as channel:
            stream = await begin(channel, long_request)
            stream.send(FromDevice(cancel=Cancel()))
            while metric("spa_sessions") >= before + 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(3 * SECONDS)
        return len(calls) - cancelled[0][1]

    assert run(cloud, scenario) <= MOST
    assert len(calls) < NEW // 2


def test_a_cloud_that_stops_waits_for_no_generation(cloud, calls, counted, long_request):
    stopped = counted(Server, "drain")

    async def scenario(port):
        async with connected(port) as channel:
            await begin(channel, long_request)

    run(cloud, scenario)
    assert len(calls) - stopped[0][1] <= MOST + 1 / SECONDS  # gRPC lets streams end for a second
    assert len(calls) < NEW // 2


def test_a_generation_whose_device_is_gone_ends(cloud, calls, counted, long_request):
    abandoned, gone = 0.3, counted(ServerSession, "detach")

    async def scenario(port):
        before = metric("spa_sessions")
        async with connected(port) as channel:
            stream = await begin(channel, long_request)
            stream.call.cancel()
            while metric("spa_sessions") > before:
                await asyncio.sleep(0.01)
            await asyncio.sleep(3 * SECONDS)
        return len(calls) - gone[0][1]

    assert run(cloud, scenario, Limits(deadline=30, abandoned=abandoned)) <= MOST + abandoned / SECONDS
    assert len(calls) < NEW // 2


def test_a_newcomer_has_its_first_token_soon(cloud, calls, counted, long_request, plugin):
    """A newcomer takes effect within a few calls, too."""
    begun, told = counted(Cloud, "begin"), counted(ServerSession, "send_progress")

    async def scenario(port):
        async with connected(port) as channel:
            stream = await begin(channel, long_request)
            other = await begin(channel, open_message(plugin, ["And thing 2?"], 2, setting="base"))
            for each in (stream, other):
                each.send(FromDevice(cancel=Cancel()))

    run(cloud, scenario, Limits(deadline=30))
    newcomer_told = next(count for session, count in told if session is not told[0][0])
    assert newcomer_told - begun[1][1] <= MOST


@pytest.mark.parametrize("seconds", [60, 3 * SECONDS])
def test_a_cloud_that_drains_begins_nothing_and_lets_end_what_ends_in_time(seconds, cloud, calls, goes_on, plugin):
    new, ended = 12, []

    async def main():
        async with (
            serving(cloud, "127.0.0.1:0", Limits(deadline=30), ServerSecurity()) as (service, port),
            connected(port) as channel,
        ):
            stream = await begin(channel, open_message(plugin, ["What is thing 1?"], new, setting="base"))
            draining = asyncio.create_task(service.drain(seconds))
            draining.add_done_callback(lambda _: ended.append(len(calls)))
            await asyncio.sleep(0)
            goes_on.set()
            late = await Stream(channel, FromDevice(open=open_message(plugin, ["Hi"], 1))).receive()
            await draining
            last = None
            while (message := await stream.receive()) is not None:
                last = message
            return late.refusal, last

    refusal, last = asyncio.run(main())
    assert (refusal.kind, "the cloud stops" in refusal.reason) == ("overloaded", True)
    if seconds == 60:
        assert last.progress.done
    else:
        assert ended[0] < new
        assert last.refusal.kind == "stopping"


@pytest.mark.slow
def test_nothing_is_kept_of_sessions_whose_devices_are_gone(cloud, plugin):
    request, count = open_message(plugin, ["What is thing 1?"], 4), 4

    def alive():
        gc.collect()
        return [kept for kept in gc.get_objects() if isinstance(kept, Session | ServerSession | Group)]

    others = alive()  # of other tests

    def ours():
        return [type(kept).__name__ for kept in alive() if not any(kept is other for other in others)]

    async def scenario(port):
        before = metric("spa_sessions")
        async with connected(port) as channel:
            streams = [Stream(channel, FromDevice(open=request)) for _ in range(count)]
            for stream in streams:
                assert (await stream.receive()).HasField("opened")
            assert ours().count("Session") == count
            for stream in streams:
                stream.call.cancel()
            while metric("spa_sessions") > before:
                await asyncio.sleep(0.05)
            for _ in range(20):
                if not ours():
                    break
                await asyncio.sleep(0.1)
            return ours()

    assert run(cloud, scenario, Limits(deadline=0.2, first_deadline=5.0, linger=0.2)) == []
