"""The device on a network: it opens the stream, answers what the cloud asks, and comes back when the line breaks."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from spa_jax.decoding.hypotheses import Generation
from spa_jax.errors import UserError
from spa_jax.split import wire
from spa_jax.split.channel import Traffic
from spa_jax.split.device import Device
from spa_jax.split.generation import device_for
from spa_jax.split.grpc_channel import DEVICE_OPTIONS, METHOD, SERVICE, read_tokens, trusted_roots
from spa_jax.split.head import Head
from spa_jax.split.messages_pb2 import Cancel, FromCloud, FromDevice, Open, Progress, Reopen, Taps
from spa_jax.weights.plugin import Plugin

log = logging.getLogger(__name__)
Watch = Callable[[Progress], None]
"""Is shown all that is generated so far."""
UNREAD = 16
"""Questions that may wait for the side network; while there are as many, nothing is read from the cloud."""


@dataclasses.dataclass(frozen=True)
class Connection:
    """How a device reaches its cloud.

    Attributes:
        address: `host:port`.
        tls: whether to speak TLS.
        ca: PEM file of the authorities to trust; empty for the system's.
        token: of this device; empty for none.
        patience: seconds to try and reach a cloud that is gone.
    """

    address: str
    tls: bool = False
    ca: str = ""
    token: str = ""
    patience: float = 10.0

    def open(self) -> grpc.aio.Channel:
        """Raises:
        UserError: the file of authorities holds none."""
        if not self.tls:
            return grpc.aio.insecure_channel(self.address, DEVICE_OPTIONS)
        roots = trusted_roots(self.ca) if self.ca else None
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(roots), DEVICE_OPTIONS)


class CloudGone(UserError):
    """The cloud cannot be reached any more; `generations` holds what was generated until then."""

    def __init__(self, message: str, generations: list[Generation]) -> None:
        super().__init__(message)
        self.generations = generations


@dataclasses.dataclass(frozen=True)
class RemoteResult:
    """What was generated, what crossed the network as this device saw it, and how many tokens went without it."""

    generations: list[Generation]
    texts: list[str]
    traffic: Traffic
    degraded: int


def read_token(path: str) -> str:
    """The token in a file; of no file, none.

    Raises:
        UserError: as of `read_tokens`, or there are several.
    """
    if not path:
        return ""
    token, *others = read_tokens(path)
    if others:
        raise UserError(f"the token file '{path}' holds {1 + len(others)} tokens, and a device has one")
    return token


async def generate(
    connection: Connection, plugin: Plugin, request: Open, watch: Watch | None = None, head: Head | None = None
) -> RemoteResult:
    """Opens a generation at the cloud and answers its questions to the end; comes back when the line breaks.

    Args:
        connection: to the cloud.
        plugin: of this device.
        request: what to generate, as of `open_message`.
        watch: is called whenever there are new tokens.
        head: the LM head, of reply mode `token`.

    Raises:
        UserError: the cloud refuses, does not know this device, or has a certificate that is not to be trusted.
        CloudGone: the line broke and could not be restored within the connection's patience.
    """
    metadata = [("authorization", f"Bearer {connection.token}")] if connection.token else []
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device") as programs:
        generation = _Remote(plugin, request, watch, head, programs)
        async with connection.open() as channel:
            method = channel.stream_stream(f"/{SERVICE}/{METHOD}")
            while True:
                reason = await generation.follow(lambda outbox: method(_drain(outbox), metadata=metadata), connection)
                if generation.progress.done:
                    return generation.result()
                if time.monotonic() - generation.heard > connection.patience:
                    raise CloudGone(
                        f"the cloud at {connection.address} is gone ({reason}); "
                        f"{sum(len(g.tokens) for g in generation.progress.generated)} tokens had been generated",
                        generation.result().generations,
                    )
                await asyncio.sleep(0.2)


class _Remote:
    """A generation as its device sees it, over one connection after another."""

    def __init__(
        self,
        plugin: Plugin,
        request: Open,
        watch: Watch | None,
        head: Head | None,
        programs: concurrent.futures.Executor,
    ) -> None:
        """`programs` runs one at a time: one that a lost connection has left behind ends before the next begins."""
        self._plugin, self._request, self._watch, self._head, self._programs = plugin, request, watch, head, programs
        self._traffic = Traffic(prefill_bytes=request.ByteSize())
        self._device: Device | None = None
        self._session, self._answered = "", 0
        self._inbox: asyncio.Queue[Taps] = asyncio.Queue(UNREAD)
        self.progress = Progress()
        self.heard = time.monotonic()

    async def follow(self, connect: "Callable[[asyncio.Queue[bytes]], Any]", connection: Connection) -> str:
        """Goes on over a new connection until it breaks, and says why; or until all is generated.

        Raises:
            UserError: as of `generate`.
        """
        self._inbox = asyncio.Queue(UNREAD)
        outbox: asyncio.Queue[bytes] = asyncio.Queue()
        outbox.put_nowait(self._first().SerializeToString())
        call = connect(outbox)
        tasks = [asyncio.create_task(self._listen(call)), asyncio.create_task(self._answer(outbox))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            return "the stream ended"
        except grpc.aio.AioRpcError as error:
            return self._why(error, connection)
        except BaseException:  # an interruption too: nobody waits for the answer any more
            outbox.put_nowait(FromDevice(cancel=Cancel()).SerializeToString())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.code(), 1.0)
            raise
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _first(self) -> FromDevice:
        """What a new connection begins with."""
        if self._session:
            return FromDevice(reopen=Reopen(session=self._session, step=self._answered))
        return FromDevice(open=self._request)

    def _why(self, error: grpc.aio.AioRpcError, connection: Connection) -> str:
        reason = error.details() or error.code().name
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(f"the cloud does not know this device: {reason}") from error
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and not self._session:
            raise UserError(f"the cloud refuses (overloaded): {reason}") from error
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise UserError(
                f"the certificate of the cloud at {connection.address} is not to be trusted ({reason}): it has "
                "expired, is for another name, or is signed by an authority that --ca does not name"
            ) from error
        if "WRONG_VERSION_NUMBER" in reason:
            raise UserError(f"the cloud at {connection.address} does not speak TLS") from error
        return reason

    async def _listen(self, call: AsyncIterator[bytes]) -> None:
        async for data in call:
            taps = self.hear(data)
            if taps is not None:
                await self._inbox.put(taps)
            if self.progress.done:
                return

    def hear(self, data: bytes) -> Taps | None:
        """Takes a message of the cloud, and returns what the side network is shown.

        Raises:
            UserError: it is a refusal, or no message.
        """
        self.heard = time.monotonic()
        message = wire.parse(FromCloud, data)
        kind = message.WhichOneof("message")
        if kind == "opened":
            self._session = message.opened.session
            lengths = list(message.opened.lengths)
            self._device = self._device or device_for(self._plugin, self._request, lengths, self._head)
        elif kind == "taps":
            return message.taps
        elif kind == "progress":
            self.progress = merged(self.progress, message.progress)
            if self._watch is not None:
                self._watch(self.progress)
        elif kind == "refusal":
            raise UserError(f"the cloud refuses ({message.refusal.kind}): {message.refusal.reason}")
        return None

    async def _answer(self, outbox: "asyncio.Queue[bytes]") -> None:
        """Answers the questions of a connection as long as it lasts; one that is senseless or out of date is left."""
        inbox, loop = self._inbox, asyncio.get_running_loop()
        while True:
            taps = await inbox.get()
            if not taps.prompt and not inbox.empty():
                continue  # the cloud has gone on without an answer, and asks the next
            device, began = self._device, time.perf_counter()
            if device is None:
                continue
            try:
                reply = await loop.run_in_executor(self._programs, device.receive, taps)
            except wire.WireError as error:
                log.warning("a question was left: %s", error)
                continue
            self._traffic.device_seconds += time.perf_counter() - began
            if reply is None:
                self._traffic.prefill_bytes += taps.ByteSize()
                continue
            data = FromDevice(reply=reply).SerializeToString()
            self._answered = taps.step
            self._traffic.exchanges += 1
            self._traffic.bytes_down += taps.ByteSize()
            self._traffic.bytes_up += len(data)
            outbox.put_nowait(data)

    def result(self) -> RemoteResult:
        """What has been generated so far."""
        generated = self.progress.generated
        return RemoteResult(
            [Generation(list(g.tokens), list(g.consulted), g.score or None) for g in generated],
            ["".join(g.pieces) for g in generated],
            self._traffic,
            self.progress.degraded,
        )


def merged(known: Progress, news: Progress) -> Progress:
    """`news`, with the tokens before its own."""
    for old, new in zip(known.generated, news.generated):
        before = new.begin
        new.begin = 0
        for name in ("tokens", "consulted", "pieces"):
            whole = [*getattr(old, name)[:before], *getattr(new, name)]
            del getattr(new, name)[:]
            getattr(new, name).extend(whole)
    return news


async def _drain(outbox: "asyncio.Queue[bytes]") -> AsyncIterator[bytes]:
    while True:
        yield await outbox.get()
