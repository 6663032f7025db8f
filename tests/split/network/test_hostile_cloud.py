"""A cloud that says whatever a test tells it: the device ends with one line, soon, and another device goes on."""

import asyncio
import contextlib
import itertools
import re
import time
import types

import grpc
import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.split import waiting, wire
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.device import Device
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import METHOD, SERVICE, ServerSecurity
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Opened, Progress, Queued, Refusal, Taps, Working
from spa_jax.split.refusals import CloudGone
from spa_jax.split.request import open_message
from spa_jax.split.server import Limits, serving

PROMPT, NEW, LENGTH = "What is thing 1?", 4, 20
SILENCE, PATIENCE, MOST_SECONDS = 1.0, 0.3, 10.0
EVIL = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202egnp.exe"


def opened(**changed):
    return FromCloud(opened=Opened(**{"session": "s", "version": wire.VERSION, "lengths": [LENGTH]} | changed))


def progress(*tokens, begin=0, done=False, **changed):
    one = {
        "tokens": tokens,
        "consulted": [False] * len(tokens),
        "pieces": ["a"] * len(tokens),
        "begin": begin,
    } | changed
    return FromCloud(progress=Progress(generated=[one], done=done))


def question(step=1, rows=(0,), positions=(LENGTH - 1,), value=1.0, count=None, **changed):
    """A question to the plugin of these tests: three taps of width 32."""
    values = np.full((len(rows) if count is None else count, 3, 32), value, np.float32)
    return FromCloud(taps=Taps(step=step, rows=rows, positions=positions, taps={"values": values.tobytes()}, **changed))


def beside(one, other):
    """Both in one message."""
    return FromCloud.FromString(one.SerializeToString() + other.SerializeToString())


def says(*messages):
    """A cloud that says this to every stream, and ends it."""

    async def script(context):
        for message in messages:
            yield message

    return script


def says_slowly(*messages):
    """The same, but every stream lasts."""

    async def script(context):
        for message in messages:
            yield message
            await asyncio.sleep(1.5 * PATIENCE)

    return script


def then_is_silent(*messages):
    async def script(context):
        for message in messages:
            yield message
        await asyncio.sleep(60)

    return script


def repeats(*messages, first=(), pause=0.0):
    """A cloud that says this again and again."""

    async def script(context):
        for message in first:
            yield message
        while True:
            for message in messages:
                yield message
                if pause:
                    await asyncio.sleep(pause)

    return script


async def abort(context):
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are\x1b[31m you\nlast line")
    yield


async def alternates(context):
    """Signs of life that tell of fewer tokens, then of more, for ever."""
    yield opened()
    for count in range(10**6):
        yield FromCloud(working=Working(tokens=count % 2))


ENDLESS = "one message after another, and 1000 of them bring|it says that it works, and has brought nothing new"
HUGE = b"\x00" * (65 * 2**20)
CASES = {
    "no generation": (says(opened(), FromCloud(progress=Progress(done=True))), "tells of 0 generations, and 1 were"),
    "two generations": (
        says(opened(), FromCloud(progress=Progress(generated=[{"tokens": [1]}] * 2))),
        "tells of 2 generations, and 1 were",
    ),
    "an end without a token": (says(opened(), progress(done=True)), "0 pieces of text and 0 tokens at the end"),
    "more tokens beside a question": (
        says(opened(), beside(progress(1, 2, 3, 4, 5), question())),
        "sends 5 tokens, and at most 4 were asked for",
    ),
    "a question for nobody beside tokens": (
        says(opened(), beside(progress(1), question(rows=(7,)))),
        r"taps of rows \[7\] at positions",
    ),
    "more tokens": (says(opened(), progress(1, 2, 3, 4, 5)), "sends 5 tokens, and at most 4 were asked for"),
    "more tokens by and by": (
        says(opened(), progress(1, 2, 3), progress(4, 5, begin=3)),
        "sends 5 tokens, and at most 4 were asked for",
    ),
    "tokens that shrink": (says(opened(), progress(1, 2, 3), progress(1, 2)), "takes back tokens"),
    "tokens that change": (says(opened(), progress(1, 2, 3), progress(1, 5, 3)), "takes back tokens"),
    "text that changes": (says(opened(), progress(1, 2), progress(1, 2, pieces=["b"])), "takes back tokens"),
    "a gap": (says(opened(), progress(1), progress(3, begin=2)), "goes on at token 2, and it has sent 1"),
    "an overlap": (says(opened(), progress(1, 2, 3), progress(3, begin=2)), "goes on at token 2, and it has sent 3"),
    "sources of other tokens": (
        says(opened(), progress(1, 2, consulted=[True] * 3)),
        "says of 3 tokens who chose them, and sends 2",
    ),
    "text without tokens": (says(opened(), progress(1, pieces=["a", "b"])), "2 pieces of text and 1 tokens"),
    "an end without its text": (says(opened(), progress(1, pieces=[], done=True)), "0 pieces of text and 1 tokens at"),
    "text without end": (says(opened(), progress(1, pieces=["a" * 5000])), "more text than tokens have"),
    "a score of NaN": (says(opened(), progress(1, score=float("nan"))), "a score that is not finite"),
    "degraded without end": (
        says(opened(), FromCloud(progress=Progress(generated=[{}], degraded=5))),
        "more degraded tokens",
    ),
    "progress for ever": (repeats(progress(1), first=[opened()]), ENDLESS),
    "signs of life for ever": (repeats(FromCloud(working=Working(tokens=9)), pause=0.1), "brought nothing new for"),
    "signs of life at once": (repeats(FromCloud(working=Working())), ENDLESS),
    "signs of life that waver": (alternates, ENDLESS),
    "nothing said at length": (repeats(b""), ENDLESS),
    "silence": (then_is_silent(), r"cannot reach the cloud at \S+ \(it has said nothing for"),
    "silence once open": (then_is_silent(opened()), r"the cloud at \S+ is gone \(it has said nothing for 1 s\); 0 tok"),
    "silence in an answer": (then_is_silent(opened(), progress(1, 2)), r"said nothing for 1 s\); 2 tokens had been"),
    "open and close": (says(opened()), r"is gone \(the stream ended\); 0 tokens"),
    "open and close by and by": (says_slowly(opened()), ENDLESS),
    "close": (says(), "cannot reach the cloud at "),
    "an answer again and again": (says(opened(), progress(1)), r"is gone \(the stream ended\); 1 tokens"),
    "65 MiB": (says(HUGE), "longer than any that was asked for"),
    "65 MiB once open": (says(opened(), HUGE), "longer than any that was asked for"),
    "1 MiB, for a small plugin": (says(opened(), HUGE[: 2**20]), "longer than any that was asked for"),
    "no message": (says(b"\xff\xffgarbage"), "9 bytes came that are no FromCloud"),
    "a prompt of 131072": (says(opened(lengths=[131072])), r"counts \[131072\] tokens in 1 prompts"),
    "a prompt of nothing": (says(opened(lengths=[0])), r"counts \[0\] tokens in 1 prompts"),
    "two prompts": (says(opened(lengths=[LENGTH] * 2)), r"counts \[20, 20\] tokens in 1 prompts"),
    "a prompt at length": (says(opened(lengths=[LENGTH] * 9999)), r"counts \[20(, 20){7}\] tokens"),
    "another version": (says(opened(version=99)), f"version 99 of the protocol and the device version {wire.VERSION}"),
    "another backbone": (says(opened(backbone="f" * 32)), f"a backbone with fingerprint {'f' * 32}, and the plugin"),
    "a session without a name": (says(opened(session="")), "names a session by 0 characters"),
    "a session with a long name": (says(opened(session="s" * 9999)), "names a session by 9999 characters"),
    "a question too soon": (says(question()), "asks before it has opened a session"),
    "a question of step 0": (says(opened(), question(0)), "a question of step 0 after one of step 0"),
    "a question of a former step": (
        says(opened(), question(3), question(2)),
        "a question of step 2 after one of step 3",
    ),
    "a question too many": (says(opened(), question(LENGTH + NEW + 1)), "a question of step 25 after"),
    "a question for ever": (repeats(question(), first=[opened()]), ENDLESS),
    "parts of the prompt for ever": (
        repeats(question(0, positions=[0], prompt=True), first=[opened()]),
        ENDLESS,
    ),
    "taps of another shape": (says(opened(), question(count=2)), "768 bytes"),
    "taps of another row": (then_is_silent(opened(), question(rows=[1])), "make no sense"),
    "taps beyond the prompt": (then_is_silent(opened(), question(positions=[LENGTH + NEW])), "make no sense"),
    "huge taps": (then_is_silent(opened(), question(value=3e38)), "give an answer that is not finite"),
    "taps of NaN": (then_is_silent(opened(), question(value=np.nan)), "numbers that are not finite"),
    "a queue without end": (repeats(FromCloud(queued=Queued(place=7)), pause=0.1), "is still number 7 in its queue"),
    "a queue that runs": (repeats(*(FromCloud(queued=Queued(place=n)) for n in (1, 9))), "is still number [19] in its"),
    "a refusal": (
        says(FromCloud(refusal=Refusal(kind=EVIL, reason=f"{EVIL}\nerror: forged\n" * 999))),
        r"the cloud refuses \(.*\): .*title.*error: forged .{,250}\.\.\.$",
    ),
    "a status": (abort, r"does not know this device: who are.* you last line$"),
}


@contextlib.asynccontextmanager
async def hostile_cloud(script):
    """Serves the script to every stream; gives the address."""

    async def serve(requests, context):
        FromDevice.FromString(await anext(aiter(requests)))
        async for message in script(context):
            yield message if isinstance(message, bytes) else message.SerializeToString()

    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture(scope="module")
def good(cloud):
    """A loop with a good cloud: (runner, address)."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        site = serving(cloud, "127.0.0.1:0", Limits(deadline=30), ServerSecurity())
        _, port = runner.run(stack.enter_async_context(site))
        yield runner, f"127.0.0.1:{port}"
        runner.run(stack.aclose())


@pytest.fixture(scope="module")
def request_(plugin):
    return open_message(plugin, [PROMPT], NEW)


@pytest.fixture(scope="module")
def here(cloud, plugin, request_):
    return in_process(cloud, plugin, request_).generations


HEARD = {
    "silence once open": lambda device: device.was_reached,
    "silence in an answer": lambda device: device._num_tokens == 2,
}
"""Whether a device has heard all that comes before the silence; from then on its clock goes, by what it sleeps."""


@pytest.fixture
def connect(case, monkeypatch):
    """Makes a connection with little patience for what a case ends by, and with much for all else."""
    watch, receive, count = waiting.Waiting.watch, Device.receive, itertools.count()
    patience, silence, signs, now = PATIENCE, 60.0, 2.0, [0.0]
    if case.startswith("silence"):
        silence = SILENCE
    if case in ("signs of life for ever", "open and close by and by"):
        signs = 2 * SILENCE / silence
        monkeypatch.setattr(waiting, "TELL_EVERY", 0.1)
    if case in ("open and close", "an answer again and again"):
        patience = 10 * PATIENCE

    async def sleep(seconds):
        await asyncio.sleep(seconds)
        now[0] += seconds

    async def watch_from_then_on(self):
        while self._connection.silence != silence or not HEARD[case](self):  # never the device of the other cloud
            await asyncio.sleep(0.01)
        await watch(self)

    def receive_some(self, taps):
        return receive(self, taps) if not taps.prompt or next(count) < 100 else None

    if case in HEARD:
        monkeypatch.setattr(waiting.Waiting, "watch", watch_from_then_on)
        monkeypatch.setattr(waiting, "asyncio", types.SimpleNamespace(sleep=sleep))
        monkeypatch.setattr(waiting, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    if case == "parts of the prompt for ever":
        monkeypatch.setattr(Device, "receive", receive_some)
    monkeypatch.setattr(waiting, "MAX_SIGNS", signs)
    return lambda address: Connection(address, patience=patience, queue_seconds=0.3, silence=silence)


@pytest.mark.parametrize("case", CASES)
def test_whatever_a_cloud_says_is_one_line_and_another_device_goes_on(case, good, plugin, request_, here, connect):
    script, message = CASES[case]
    runner, good_address = good

    async def scenario():
        async with hostile_cloud(script) as address:
            deceived = asyncio.create_task(generate(connect(address), plugin, request_))
            other = await generate(Connection(good_address), plugin, request_)
            with pytest.raises(UserError) as refused:
                await asyncio.wait_for(deceived, MOST_SECONDS)
            return refused.value, other

    began = time.monotonic()
    error, other = runner.run(scenario())
    assert time.monotonic() - began < MOST_SECONDS
    assert re.search(message, str(error)), error
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 1000
    assert other.generations == here
    if isinstance(error, CloudGone):
        count = re.search(r"(\d+) tokens had been generated", str(error))
        assert sum(len(each.tokens) for each in error.generations) == (int(count[1]) if count else 0)
