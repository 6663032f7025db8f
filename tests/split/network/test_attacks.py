"""Hostile clients: what one of them can hold of a cloud is bounded, is given back, and costs the others little."""

import asyncio
import contextlib
import dataclasses
import itertools
import statistics
import time

import jax
import pytest
import raw_http2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from streams import Stream, connected, metric
from tiny_split import random_plugin

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import Sampling
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import METHOD, SERVICE, ServerSecurity
from spa_jax.split.health import MAX_CHECKS, MAX_WATCHERS
from spa_jax.split.messages_pb2 import FromDevice, Reply, Tensor
from spa_jax.split.plan import MAX_PROMPT_SIZE
from spa_jax.split.request import open_message
from spa_jax.split.server import MAX_GUESSES_OF_ONE, MAX_SILENT, Limits, serving
from spa_jax.split.session import Cloud
from spa_jax.split.streams import Room

MANY = 300
GENERATE, CHECK, WATCH = f"/{SERVICE}/{METHOD}", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
LIMITS = Limits(deadline=30, abandoned=2.0)
BEARER = [("authorization", "Bearer hostile")]


@pytest.fixture(scope="module")
def security(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("good\nhostile\n")
    return ServerSecurity(tokens=str(path))


@pytest.fixture(scope="module")
def request_(plugin):
    return open_message(plugin, ["What is thing 1?"], 6)


@contextlib.asynccontextmanager
async def watchers(port, request):
    """Watch the health of the cloud, for ever."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connected(port)) for _ in range(MANY // 100)]
        calls = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            for channel in channels
            for _ in range(100)
        ]
        await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
        yield


def by_hand(path, *messages, window=65535, token="", calls=100):
    """Makes an attack of calls that begin so, whose client takes so many bytes of an answer."""

    @contextlib.asynccontextmanager
    async def attack(port, request):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(MANY // calls):
                writer = await stack.enter_async_context(raw_http2.connection(port, window))
                for number in range(calls):
                    said = [each(request) if callable(each) else each for each in messages]
                    writer.write(raw_http2.call(number, path, *said, token=token))
                await writer.drain()
            await asyncio.sleep(0.3)
            yield

    return attack


@contextlib.asynccontextmanager
async def guessers(port, request):
    """Try one token after another, all at once."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connected(port)) for _ in range(MANY // 100)]
        for number in range(MANY):
            header = [("authorization", f"Bearer {number}")]
            Stream(channels[number // 100], FromDevice(open=request), header)
        await asyncio.sleep(0.3)
        yield


@contextlib.asynccontextmanager
async def leavers(port, request):
    """Open sessions and leave them."""
    before = metric("spa_sessions")
    async with connected(port) as channel:
        streams = [Stream(channel, FromDevice(open=request), BEARER) for _ in range(64)]
        while metric("spa_sessions") < before + LIMITS.sessions_per_token:
            await asyncio.sleep(0.01)
        for stream in streams:
            stream.call.cancel()
    yield


@contextlib.asynccontextmanager
async def large_messages(port, request):
    """Begin with messages that cost much to read, again and again."""
    long = type(request)()
    long.CopyFrom(request)
    long.prompts[0].text = "word " * (MAX_PROMPT_SIZE // 5)
    empty = FromDevice(open=type(request)(prompts=[{}] * 2**19)).SerializeToString()

    async def flood(channel, first):
        while True:
            await Stream(channel, first, BEARER).receive()

    async with connected(port) as channel:
        tasks = [asyncio.create_task(flood(channel, first)) for first in (empty, *[FromDevice(open=long)] * 16)]
        yield
        for task in tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def shouters(port, request):
    """Answer a question with more bytes than any reply has, and one that was not asked."""
    async with connected(port) as channel:
        before = metric("spa_dropped_messages_total")
        streams = [Stream(channel, FromDevice(open=request), BEARER) for _ in range(LIMITS.sessions_per_token)]
        for stream in streams:
            while not (message := await stream.receive()).HasField("taps"):
                pass
            for step, size in SHOUTED:
                stream.send(FromDevice(reply=Reply(step=message.taps.step + step, g=Tensor(values=bytes(size)))))
        yield
        async with asyncio.timeout(60):
            while metric("spa_dropped_messages_total") < before + len(SHOUTED) * len(streams):
                await asyncio.sleep(0.05)


SHOUTED = [(0, 7 * 2**20), (0, 7 * 2**20), (1, 128), (1, 128), (-1, 128)]
"""Steps after the question's, and bytes: none is a reply."""


def first_message(request):
    return FromDevice(open=request).SerializeToString()


ATTACKS = {
    "watchers": watchers,
    "watchers that say nothing": by_hand(WATCH),
    "watchers that do not listen": by_hand(WATCH, b"", window=0),
    "checks that say nothing": by_hand(CHECK),
    "checks that do not listen": by_hand(CHECK, b"", window=0),
    "idle streams without a token": by_hand(GENERATE),
    "idle streams with a token": by_hand(GENERATE, token="hostile"),
    "requests that do not listen": by_hand(GENERATE, first_message, token="hostile", window=0),
    "refusals that nobody listens to": by_hand(GENERATE, b"nonsense", token="hostile", window=0),
    "guesses": guessers,
    "sessions opened and left": leavers,
    "large first messages": large_messages,
    "replies that nobody waits for": shouters,
}


HELD = {
    "watchers": [MAX_WATCHERS, 0, 0, 0],
    "watchers that say nothing": [MAX_WATCHERS, 0, 0, 0],
    "watchers that do not listen": [MAX_WATCHERS, 0, 0, 0],
    "checks that say nothing": [0, MAX_CHECKS, 0, 0],
    "checks that do not listen": [0, MAX_CHECKS, 0, 0],
    "idle streams with a token": [0, 0, MAX_SILENT, 0],
}
"""Of some attacks, the streams that watch and check the health, that say nothing, and whose tokens wait."""


@pytest.fixture
def comers(monkeypatch):
    """A list that grows with each stream that comes to any room."""
    stay, found = Room.stay, []

    def counted(room, owner, seconds):
        found.append(owner)
        return stay(room, owner, seconds)

    monkeypatch.setattr(Room, "stay", counted)
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_others_their_room_and_gives_its_own_back(name, cloud, plugin, request_, security, comers):
    """In the midst of it a device has its session, and afterwards the cloud is as before."""
    here, sessions = in_process(cloud, plugin, request_), metric("spa_sessions")
    is_timed = name.endswith("not listen") or "idle" in name or "nothing" in name
    limits = dataclasses.replace(LIMITS, open_seconds=5.0 if is_timed else 30.0)

    async def main():
        async with serving(cloud, "127.0.0.1:0", limits, security) as (service, port):
            device = Connection(f"127.0.0.1:{port}", token="good")
            async with ATTACKS[name](port, request_):
                rooms = service.health.watchers, service.health.checks, service._silent, service._guessing
                async with asyncio.timeout(30):
                    while is_timed and len(comers) < MANY - 1:  # the first to guess does not wait
                        await asyncio.sleep(0.01)
                    while name in HELD and [room.taken for room in rooms] != HELD[name]:
                        await asyncio.sleep(0.01)
                assert rooms[3].taken <= MAX_GUESSES_OF_ONE
                there = await asyncio.wait_for(generate(device, plugin, request_), 30)
                async with connected(port) as channel:
                    check = health_pb2_grpc.HealthStub(channel).Check
                    assert (await check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)).status == 1
                if is_timed:
                    rooms = service._silent, service._planned, service._guessing, service.health.checks
                    async with asyncio.timeout(20):  # sooner than the keepalive ends connections made by hand
                        while [room.taken for room in rooms] != [0, 0, 0, 0]:
                            await asyncio.sleep(0.01)
            async with asyncio.timeout(20):
                while service.admission._inside or service.admission._waiting or service.health.watchers.taken:
                    await asyncio.sleep(0.05)
            assert metric("spa_sessions") == sessions
        return there

    there = asyncio.run(main())
    assert there.generations == here.generations
    assert there.degraded == 0
    cloud.engine.drop_finished()
    assert cloud.engine._groups == []


@pytest.mark.parametrize("name", ["watchers that do not listen", "requests that do not listen"])
def test_an_attack_keeps_no_cloud_from_stopping(name, cloud, request_, security):
    async def main():
        async with contextlib.AsyncExitStack() as attackers:
            async with serving(cloud, "127.0.0.1:0", Limits(), security) as (service, port):
                await attackers.enter_async_context(ATTACKS[name](port, request_))
                began = time.monotonic()
                await service.drain(0)
            return time.monotonic() - began

    assert asyncio.run(main()) < 5


def test_one_too_many_ends_the_oldest_of_whoever_has_most():
    ended = []

    async def hold(room, name):
        try:
            async with room.stay(name[0], None):
                await asyncio.sleep(60)
        except TimeoutError:
            ended.append(name)

    async def main():
        room, tasks = Room(4, most_of_one=3), []
        for name in ("b1", "a1", "a2", "a3", "a4", "b2", "c1", "c2"):
            tasks.append(asyncio.create_task(hold(room, name)))
            await asyncio.sleep(0.01)
            assert room.taken <= 4
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return room.taken

    assert asyncio.run(main()) == 0
    assert ended == ["a1", "a2", "b1", "a3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_slows_nobody_by_much(name, cloud, plugin, security):
    """The time between tokens stays within three times, but for a few milliseconds: attackers share this process."""
    asked = open_message(plugin, ["What is thing 1?"], 60)

    async def gaps(port):
        found = []
        for _ in range(3):
            came = []
            device = Connection(f"127.0.0.1:{port}", token="good")
            await generate(device, plugin, asked, lambda _, came=came: came.append(time.perf_counter()))
            found += [b - a for a, b in itertools.pairwise(came)]
        return statistics.median(found)

    async def main():
        limits = dataclasses.replace(LIMITS, open_seconds=10, abandoned=30)
        async with serving(cloud, "127.0.0.1:0", limits, security) as (_, port):
            await gaps(port)
            without = await gaps(port)
            async with ATTACKS[name](port, asked):
                return without, await gaps(port)

    without, within = asyncio.run(main())
    print(f"{name}: {1e3 * without:.1f} ms between tokens, {1e3 * within:.1f} ms in the midst of it")
    assert within < 3 * without + 0.005


@pytest.fixture(scope="module")
def compilations():
    """Counts programs that are compiled, or read from disk."""
    seen, is_on = [], True

    def count(event, duration_secs, **_):
        if is_on and event.endswith("/backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield seen
    is_on = False


def test_what_a_request_names_is_compiled_once_if_at_all(backbone, compilations):
    """The numbers in a request, of which there are many, are arguments of programs that are there. The cache has its
    size from the beginning."""
    cloud = Cloud(backbone)
    cloud.engine.slots.bound(2**22)
    cloud.engine.slots.grow()
    plugins = {
        (entry, edits): random_plugin(backbone, "spa", entry=entry, edits=edits)
        for entry, edits in (("head", "targets"), (1, "targets"), (2, "targets"), (2, "all"))
    }

    def ask(which, number, beams=None, **wishes):
        request = open_message(plugins[which], ["What is thing 1?"], 8 + number, beams=beams, **wishes)
        in_process(cloud, plugins[which], request)

    def ask_all(number):
        for which in plugins:
            ask(which, number, threshold=0.01 * number, seed=number, sampling=Sampling(0.1 * number, number, 0.9))
        ask(("head", "targets"), number, Beams(3 + number % 2, length_penalty=0.1 * number))

    ask_all(1)
    ask_all(36)
    before = len(compilations)
    assert before > 0
    for number in range(2, 36, 9):
        ask_all(number)
    assert len(compilations) == before
