"""The device on a network: it opens the stream, answers the cloud's questions, and reconnects when the line breaks."""

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
from spa_jax.split.grpc_channel import DEVICE_OPTIONS, METHOD, SERVICE, read_tokens, trusted_roots
from spa_jax.split.head import Head
from spa_jax.split.messages_pb2 import Cancel, FromCloud, FromDevice, Open, Progress, Reopen, Taps
from spa_jax.split.request import device_for
from spa_jax.weights.plugin import Plugin

log = logging.getLogger(__name__)
OnProgress = Callable[[Progress], None]
"""Called with all that is generated so far."""
MAX_QUEUED = 16
"""Questions that may wait for the side network; while there are as many, nothing is read from the cloud."""


@dataclasses.dataclass(frozen=True)
class Connection:
    """The address of a cloud, and how to reach it.

    Attributes:
        address: `host:port`.
        tls: whether to speak TLS.
        ca: PEM file of the authorities to trust; empty for the system's.
        token: that this device shows; empty for none.
        patience: seconds to try to reconnect to a cloud that is gone.
    """

    address: str
    tls: bool = False
    ca: str = ""
    token: str = ""
    patience: float = 10.0

    def open(self) -> grpc.aio.Channel:
        """Opens a channel, which connects when it is first used.

        Raises:
            UserError: the file of authorities holds none.
        """
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
    """The generations of a request, with their texts, the traffic that this device saw, the tokens that were chosen
    without the reply they waited for, and the prompts that were to be corrected and were not."""

    generations: list[Generation]
    texts: list[str]
    traffic: Traffic
    degraded: int
    uncorrected_prompts: int = 0


def read_token(path: str) -> str:
    """Reads the one token in a file; an empty path gives an empty token.

    Raises:
        UserError: the file cannot be read, or does not hold exactly one printable ASCII token.
    """
    if not path:
        return ""
    token, *others = read_tokens(path)
    if others:
        raise UserError(f"the token file '{path}' holds {1 + len(others)} tokens, and a device has one")
    return token


async def generate(
    connection: Connection,
    plugin: Plugin,
    request: Open,
    on_progress: OnProgress | None = None,
    head: Head | None = None,
) -> RemoteResult:
    """Opens a generation at the cloud and answers its questions to the end; reconnects when the line breaks.

    Args:
        connection: to the cloud.
        plugin: of this device.
        request: made by `open_message` for that plugin.
        on_progress: called whenever there are new tokens.
        head: the LM head, for reply mode `token`.

    Raises:
        UserError: the cloud refuses, does not know this device, or has a certificate that is not to be trusted.
        CloudGone: the line broke and could not be restored within the connection's patience.
    """
    metadata = [("authorization", f"Bearer {connection.token}")] if connection.token else []
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device") as programs:
        client = DeviceClient(plugin, request, on_progress, head, programs)
        async with connection.open() as channel:
            method = channel.stream_stream(f"/{SERVICE}/{METHOD}")
            while True:
                reason = await client.run_stream(lambda outbox: method(_drain(outbox), metadata=metadata), connection)
                if client.progress.done:
                    return client.result()
                if time.monotonic() - client.last_message_at > connection.patience:
                    raise CloudGone(
                        f"the cloud at {connection.address} is gone ({reason}); "
                        f"{sum(len(g.tokens) for g in client.progress.generated)} tokens had been generated",
                        client.result().generations,
                    )
                await asyncio.sleep(0.2)


class DeviceClient:
    """A generation as its device sees it, over one stream after another.

    Attributes:
        progress: all that is generated so far.
        last_message_at: seconds on `time.monotonic`'s clock.
    """

    def __init__(
        self,
        plugin: Plugin,
        request: Open,
        on_progress: OnProgress | None,
        head: Head | None,
        programs: concurrent.futures.Executor,
    ) -> None:
        """`programs` runs one at a time: one that a lost stream has left behind ends before the next begins."""
        self._plugin, self._request, self._on_progress, self._head = plugin, request, on_progress, head
        self._programs = programs
        self._traffic = Traffic(prefill_bytes=request.ByteSize())
        self._device: Device | None = None
        self._session, self._answered_step = "", 0
        self._questions: asyncio.Queue[Taps] = asyncio.Queue(MAX_QUEUED)
        self.progress = Progress()
        self.last_message_at = time.monotonic()

    async def run_stream(self, connect: "Callable[[asyncio.Queue[bytes]], Any]", connection: Connection) -> str:
        """Opens or reopens the session over a new stream, and answers until all is generated or the stream ends.

        Returns:
            Why it ended.

        Raises:
            UserError: the cloud refuses, does not know this device, or has a certificate that is not to be trusted.
        """
        self._questions = asyncio.Queue(MAX_QUEUED)
        outbox: asyncio.Queue[bytes] = asyncio.Queue()
        outbox.put_nowait(self._first_message().SerializeToString())
        call = connect(outbox)
        tasks = [asyncio.create_task(self._listen(call)), asyncio.create_task(self._answer(outbox))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            return "the stream ended"
        except grpc.aio.AioRpcError as error:
            return self._reason(error, connection)
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

    def _first_message(self) -> FromDevice:
        """Makes the message that a stream begins with."""
        if self._session:
            return FromDevice(reopen=Reopen(session=self._session, step=self._answered_step))
        return FromDevice(open=self._request)

    def _reason(self, error: grpc.aio.AioRpcError, connection: Connection) -> str:
        """Says why a stream broke.

        Raises:
            UserError: for a reason that another stream would not change.
        """
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
        """Handles the cloud's messages until all is generated."""
        async for data in call:
            question = self.handle_message(data)
            if question is not None:
                await self._questions.put(question)
            if self.progress.done:
                return

    def handle_message(self, data: bytes) -> Taps | None:
        """Takes a message of the cloud, and returns it if it is for the side network.

        Raises:
            UserError: it is a refusal, or no message.
        """
        self.last_message_at = time.monotonic()
        message = wire.parse(FromCloud, data)
        kind = message.WhichOneof("message")
        if kind == "opened":
            self._session = message.opened.session
            lengths = list(message.opened.lengths)
            self._device = self._device or device_for(self._plugin, self._request, lengths, self._head)
        elif kind == "taps":
            return message.taps
        elif kind == "progress":
            self.progress = merge_progress(self.progress, message.progress)
            if self._on_progress is not None:
                self._on_progress(self.progress)
        elif kind == "refusal":
            raise UserError(f"the cloud refuses ({message.refusal.kind}): {message.refusal.reason}")
        return None

    async def _answer(self, outbox: "asyncio.Queue[bytes]") -> None:
        """Answers questions as long as the stream lasts, but none that is senseless or out of date."""
        questions, loop = self._questions, asyncio.get_running_loop()
        while True:
            taps = await questions.get()
            if not taps.prompt and not questions.empty():
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
            self._answered_step = taps.step
            if taps.prompt:
                self._traffic.opening_exchanges += 1
                self._traffic.prefill_bytes += taps.ByteSize() + len(data)
            else:
                self._traffic.exchanges += 1
                self._traffic.bytes_down += taps.ByteSize()
                self._traffic.bytes_up += len(data)
            outbox.put_nowait(data)

    def result(self) -> RemoteResult:
        """Collects what has been generated so far."""
        generated = self.progress.generated
        return RemoteResult(
            [Generation(list(g.tokens), list(g.consulted), g.score or None) for g in generated],
            ["".join(g.pieces) for g in generated],
            self._traffic,
            self.progress.degraded,
            self.progress.uncorrected_prompts,
        )


def merge_progress(previous: Progress, new: Progress) -> Progress:
    """Returns `new` with the tokens before its own, which it leaves out, taken from `previous`."""
    for old, generated in zip(previous.generated, new.generated):
        begin = generated.begin
        generated.begin = 0
        for name in ("tokens", "consulted", "pieces"):
            values = [*getattr(old, name)[:begin], *getattr(generated, name)]
            del getattr(generated, name)[:]
            getattr(generated, name).extend(values)
    return new


async def _drain(outbox: "asyncio.Queue[bytes]") -> AsyncIterator[bytes]:
    while True:
        yield await outbox.get()
