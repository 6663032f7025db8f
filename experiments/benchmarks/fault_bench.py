"""Faults against real clouds in processes of their own, and what becomes of a generation.

Clouds speak TLS and know their devices by tokens. The judge is a generation in one process whose channel loses the same
answers.
"""

import asyncio
import contextlib
import dataclasses
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import trustme

from spa_jax.errors import UserError
from spa_jax.split.channel import Answer, InProcess
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import LocalCloud, cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import MAX_BYTES_UP, METHOD, SERVICE
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Progress, Reopen, Reply, Tensor
from spa_jax.split.refusals import CloudGone
from spa_jax.split.request import device_for, open_message
from spa_jax.split.server import Limits
from spa_jax.split.session import Cloud
from spa_jax.split.trust import merge_progress
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin

PROMPT, NEW = "By which name do you call your donkey?", 8
FAULTY = 2
"""The step of the exchange that goes wrong, of those that have one."""
DEADLINE, IDLE = 2.0, 200
HELD = """
import runpy, time
from spa_jax.split.device import Device
receive = Device.receive
Device.receive = lambda device, taps: time.sleep(600) if taps.step > 2 else receive(device, taps)
runpy.run_module("spa_jax.serve", run_name="__main__", alter_sys=True)
"""
"""A device that is at work on its third answer whenever it is killed."""
WHOLE, ONE, REST, ALL = "nothing is lost", "one token from f alone", "the rest from f alone", "all from f alone"


class FaultHarness:
    """Starts clouds, and knows the tokens that generations on them ought to give."""

    def __init__(self, backbone: Backbone, plugin: Plugin, plugin_directory: Path, folder: Path) -> None:
        self.backbone, self.plugin, self.plugin_directory, self.folder = backbone, plugin, plugin_directory, folder
        self._local = Cloud(backbone)
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        (folder / "tokens").write_text("good-token\n", encoding="utf-8")
        self.request = open_message(plugin, [PROMPT], NEW, threshold=0.0)
        self.steps = in_process(self._local, plugin, self.request).traffic.exchanges

    def expected(self, lost: frozenset[int] = frozenset()) -> list[int]:
        """Returns the tokens of a generation whose exchanges of these steps, from 1, are not answered."""

        def connect(answer: Answer) -> InProcess:
            return _Losing(answer, lost)

        (generation,) = in_process(self._local, self.plugin, self.request, connect).generations
        return generation.tokens

    @contextlib.contextmanager
    def cloud(self, expired: bool = False) -> Iterator["RunningCloud"]:
        """Runs a cloud with a valid or an expired certificate."""
        now = datetime.now(UTC)
        ends = now - timedelta(days=1) if expired else now + timedelta(days=1)
        certificate = self.authority.issue_cert("127.0.0.1", not_before=now - timedelta(days=9), not_after=ends)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            site = Path(name)
            certificate.private_key_pem.write_to_path(site / "key.pem")
            certificate.cert_chain_pems[0].write_to_path(site / "cert.pem")
            own = [f"--tls_cert={site}/cert.pem", f"--tls_key={site}/key.pem", f"--tokens={self.folder}/tokens"]
            with cloud_process(self.backbone.name, *own, f"--deadline={DEADLINE}", log=site / "log") as cloud:
                yield RunningCloud(self, cloud, site / "log")

    def outcome(self, progress: Progress) -> str:
        """Describes what came of a generation, in the words of the table."""
        (answer,) = progress.generated
        tokens, degraded = list(answer.tokens), progress.degraded
        for words, lost in (
            (WHOLE, frozenset[int]()),
            (ONE, frozenset([FAULTY])),
            (ALL, frozenset(range(1, 99))),
            (REST, frozenset(range(len(tokens) - degraded + 1, 99))),
        ):
            count = min(len(lost), len(tokens))
            if tokens == self.expected(lost) and (degraded == count or (words == REST and 0 < degraded < len(tokens))):
                return words
        return f"{len(tokens)} tokens, {degraded} degraded, which nothing explains"


class _Losing(InProcess):
    def __init__(self, answer: Answer, lost: frozenset[int]) -> None:
        super().__init__(answer)
        self._lost = lost

    def exchange(self, message: bytes) -> bytes | None:
        reply = super().exchange(message)
        return None if self.traffic.exchanges in self._lost else reply


@dataclasses.dataclass(frozen=True)
class RunningCloud:
    """A cloud that runs, for one harness."""

    harness: FaultHarness
    cloud: LocalCloud
    log: Path

    @property
    def connection(self) -> Connection:
        """The connection of an honest device."""
        ca = str(self.harness.folder / "ca.pem")
        return Connection(self.cloud.address, tls=True, ca=ca, token="good-token", patience=1.0)

    async def generate_without_fault(self) -> Progress:
        """Generates without a fault, as far as the device can tell."""
        seen = [Progress()]
        await generate(self.connection, self.harness.plugin, self.harness.request, seen.append)
        return seen[-1]

    @contextlib.asynccontextmanager
    async def stream(self, first: FromDevice | None) -> AsyncIterator["DeviceStream"]:
        """Opens a stream that begins with this message, or says nothing."""
        async with self.connection.open() as channel:
            stream = DeviceStream(channel, self.connection.token)
            if first is not None:
                stream.say(first.SerializeToString())
            yield stream
            stream.call.cancel()

    async def run_session(
        self, respond: "Respond", first: FromDevice | None = None, until: int = 99
    ) -> tuple[str, Progress]:
        """Sends what `respond` makes of each honest reply, up to a question; returns the session and its progress."""
        session, device, progress, said = "", None, Progress(), []
        async with self.stream(first or FromDevice(open=self.harness.request)) as stream:
            async for message in stream.messages():
                if message.HasField("progress"):
                    progress = merge_progress(progress, message.progress)
                    if progress.done:
                        break
                if message.HasField("opened"):
                    session = message.opened.session
                    device = device_for(self.harness.plugin, self.harness.request, list(message.opened.lengths))
                elif message.HasField("taps") and device is not None:
                    said.append(device.receive(message.taps))
                    for data in await respond(message.taps.step, said):
                        stream.say(data)
                    if message.taps.step == until:
                        break
        return session, progress


class DeviceStream:
    """A stream of bytes from a device."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        metadata = [("authorization", f"Bearer {token}")]
        self.call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._drain(), metadata=metadata)

    def say(self, data: bytes) -> None:
        """Sends bytes."""
        self._outbox.put_nowait(data)

    async def messages(self) -> AsyncIterator[FromCloud]:
        """Yields what the cloud says, until the stream ends, however it does."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for data in self.call:
                yield FromCloud.FromString(data)

    async def _drain(self) -> AsyncIterator[bytes]:
        while True:
            yield await self._outbox.get()


Respond = Callable[[int, list[Reply | None]], Awaitable[list[bytes]]]
"""(step, all honest replies so far) -> what is sent."""


def _bytes(reply: Reply | None) -> bytes:
    return FromDevice(reply=reply).SerializeToString()


async def reply_honestly(step: int, replies: list[Reply | None]) -> list[bytes]:
    """Replies honestly."""
    return [_bytes(replies[-1])]


def replace_reply(make: Callable[[Reply], list[bytes]]) -> Callable[[RunningCloud], Awaitable[str]]:
    """Makes a fault at step `FAULTY`: something else goes back than the honest reply."""

    async def respond(step: int, replies: list[Reply | None]) -> list[bytes]:
        reply = replies[-1]
        assert reply is not None
        return make(reply) if step == FAULTY else [_bytes(reply)]

    async def run(site: RunningCloud) -> str:
        return site.harness.outcome((await site.run_session(respond))[1])

    return run


async def slow(site: RunningCloud) -> str:
    """The answer comes after the deadline."""

    async def respond(step: int, replies: list[Reply | None]) -> list[bytes]:
        if step == FAULTY:
            await asyncio.sleep(1.2 * DEADLINE)
        return [_bytes(replies[-1])]

    return site.harness.outcome((await site.run_session(respond))[1])


async def reordered(site: RunningCloud) -> str:
    """An answer comes when the next question is already asked, before that one's answer."""

    async def respond(step: int, replies: list[Reply | None]) -> list[bytes]:
        if step == FAULTY:
            return []
        return [_bytes(reply) for reply in (replies[-2:] if step == FAULTY + 1 else replies[-1:])]

    return site.harness.outcome((await site.run_session(respond))[1])


async def reconnected(site: RunningCloud) -> str:
    """The stream breaks after three answers, and the device comes back."""
    session, _ = await site.run_session(reply_honestly, until=3)
    _, progress = await site.run_session(reply_honestly, FromDevice(reopen=Reopen(session=session)))
    return site.harness.outcome(progress)


async def oversized(site: RunningCloud) -> str:
    """A message above the limit ends its stream; the device comes back when the cloud has gone on without it."""

    async def respond(step: int, replies: list[Reply | None]) -> list[bytes]:
        return [bytes(MAX_BYTES_UP + 1)] if step == FAULTY else [_bytes(replies[-1])]

    session, _ = await site.run_session(respond)
    await asyncio.sleep(DEADLINE)
    _, progress = await site.run_session(reply_honestly, FromDevice(reopen=Reopen(session=session)))
    return site.harness.outcome(progress)


async def vanished(site: RunningCloud) -> str:
    """A real device process is killed in the midst of a generation; its session's result is fetched afterwards."""
    before = site.log.read_text(encoding="utf-8")
    (site.harness.folder / "token").write_text("good-token", encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HELD, "device", f"--plugin={site.harness.plugin_directory}", "--tls",
        f"--cloud={site.cloud.address}", f"--ca={site.harness.folder}/ca.pem", f"--prompt={PROMPT}",
        f"--token_file={site.harness.folder}/token", f"--max_new_tokens={NEW}", "--threshold=0",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    await process.stdout.read(1)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    opened = r"session ([0-9a-f]{32}) opened"
    known = set(re.findall(opened, before))
    mine = [found for found in re.findall(opened, site.log.read_text(encoding="utf-8")) if found not in known]
    for session in mine:  # the other one is the bystander's
        await _finished(site, session)
        _, progress = await site.run_session(reply_honestly, FromDevice(reopen=Reopen(session=session)))
        if progress.degraded:
            return site.harness.outcome(progress)
    return "the killed device's session lost nothing"


async def _finished(site: RunningCloud, session: str) -> None:
    while not re.search(rf"session {session}: \d+ tokens", site.log.read_text(encoding="utf-8")):
        await asyncio.sleep(0.1)


async def deaf(site: RunningCloud) -> str:
    """A device opens a session and does not read its stream until the generation is over."""
    async with site.stream(FromDevice(open=site.harness.request)) as stream:
        await asyncio.sleep(Limits.first_deadline + (site.harness.steps + 1) * DEADLINE)
        progress = Progress()
        async for message in stream.messages():
            if message.HasField("progress"):
                progress = merge_progress(progress, message.progress)
    return site.harness.outcome(progress)


async def idle(site: RunningCloud) -> str:
    """Streams that say nothing."""
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(site.stream(None)) for _ in range(IDLE)]
        codes = await asyncio.gather(*(stream.call.code() for stream in streams))
    closed = sum(code == grpc.StatusCode.DEADLINE_EXCEEDED for code in codes)
    return f"{closed} streams closed by the cloud"


async def refused(site: RunningCloud) -> str:
    """A device whose token the cloud does not know."""
    with contextlib.suppress(CloudGone):
        try:
            connection = dataclasses.replace(site.connection, token="bad-token")
            await generate(connection, site.harness.plugin, site.harness.request)
        except UserError as error:
            return f"refused: {str(error).split(':')[0]}"
    return "served, or taken for gone"


async def distrusted(site: RunningCloud) -> str:
    """A cloud whose certificate has expired."""
    try:
        await generate(site.connection, site.harness.plugin, site.harness.request)
    except CloudGone:
        return "taken for gone"
    except UserError as error:
        return "not spoken to: expired" if "certificate has expired" in str(error) else str(error)
    return "trusted"


async def cloud_killed(site: RunningCloud) -> str:
    """The cloud's process is killed in the midst of a generation."""
    seen: list[list[int]] = []

    def watch(progress: Progress) -> None:
        seen.append(list(progress.generated[0].tokens))
        if len(seen) == 3:
            site.cloud.process.send_signal(signal.SIGKILL)

    try:
        await generate(site.connection, site.harness.plugin, site.harness.request, watch)
    except CloudGone as error:
        kept = error.generations[0].tokens
        if kept == seen[-1] == site.harness.expected()[: len(kept)] and kept:
            return "an error that has the tokens so far"
        return f"an error with {kept}"
    return "no error"


def _random(reply: Reply) -> list[bytes]:
    return [secrets.token_bytes(size) for size in (1, 10, 1000)]


def _infinite(reply: Reply) -> list[bytes]:
    nan = np.full(len(reply.g.values) // 4, np.nan, "<f4").tobytes()
    return [_bytes(Reply(step=reply.step, g=Tensor(values=nan)))]


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        documented: what becomes of the generation.
        run: does it, and says what was observed.
        alone: needs a cloud of its own.
        expired: that has an expired certificate.
    """

    documented: str
    run: Callable[[RunningCloud], Awaitable[str]]
    alone: bool = False
    expired: bool = False


FAULTS = {
    "device killed": Fault(REST, vanished),
    "slower than the deadline": Fault(ONE, slow),
    "wrong shape": Fault(ONE, replace_reply(lambda reply: [_bytes(Reply(step=reply.step, g=Tensor(values=b"123")))])),
    "wrong step": Fault(ONE, replace_reply(lambda reply: [_bytes(Reply(step=reply.step + 7, g=reply.g))])),
    "NaN": Fault(ONE, replace_reply(_infinite)),
    "truncated bytes": Fault(ONE, replace_reply(lambda reply: [_bytes(reply)[:-9]])),
    "random bytes": Fault(ONE, replace_reply(_random)),
    "oversized bytes": Fault(ONE, oversized),
    "duplicate": Fault(WHOLE, replace_reply(lambda reply: 3 * [_bytes(reply)])),
    "reordered": Fault(ONE, reordered),
    "reconnect": Fault(WHOLE, reconnected),
    "slow reader": Fault(ALL, deaf),
    f"{IDLE} idle streams": Fault(f"{IDLE} streams closed by the cloud", idle),
    "bad token": Fault("refused: the cloud does not know this device", refused),
    "expired certificate": Fault("not spoken to: expired", distrusted, alone=True, expired=True),
    "cloud killed": Fault("an error that has the tokens so far", cloud_killed, alone=True),
}


async def observe(fault: Fault, site: RunningCloud) -> dict[str, str | float]:
    """Runs a fault beside an honest session."""
    began = time.perf_counter()
    if fault.alone:
        observed, wrong = await fault.run(site), 0
    else:
        observed, other = await asyncio.gather(fault.run(site), site.generate_without_fault())
        tokens = list(other.generated[0].tokens)
        wrong = sum(a != b for a, b in zip(tokens, site.harness.expected())) + other.degraded
    seconds = round(time.perf_counter() - began, 2)
    return {"documented": fault.documented, "observed": observed, "seconds": seconds, "wrong tokens of others": wrong}
