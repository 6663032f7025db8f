"""The device on a network: it opens the stream, answers what the cloud asks, and comes back when the line breaks."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from spa_jax.decoding.hypotheses import Generation
from spa_jax.errors import UserError
from spa_jax.split.channel import Traffic
from spa_jax.split.generation import device_for
from spa_jax.split.grpc_channel import METHOD, OPTIONS, SERVICE, read_file
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Open, Progress, Reopen, Taps
from spa_jax.weights.plugin import Plugin

Watch = Callable[[Progress], None]
"""Is shown what is generated so far."""


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
        UserError: the authorities cannot be read."""
        if not self.tls:
            return grpc.aio.insecure_channel(self.address, OPTIONS)
        roots = read_file(self.ca) if self.ca else None
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(roots), OPTIONS)


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
        UserError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").strip() if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the token file '{path}': {error}") from error


async def generate(connection: Connection, plugin: Plugin, request: Open, watch: Watch | None = None) -> RemoteResult:
    """Opens a generation at the cloud and answers its questions to the end.

    Raises:
        UserError: the cloud refuses, or does not know this device.
        CloudGone: the line broke and could not be restored within the connection's patience.
    """
    device, traffic = None, Traffic()
    traffic.prefill_bytes += request.ByteSize()
    progress, session, tried = Progress(), "", time.monotonic()
    metadata = [("authorization", f"Bearer {connection.token}")] if connection.token else []
    async with connection.open() as channel:
        method = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        while True:
            outbox: asyncio.Queue[bytes] = asyncio.Queue()
            first = FromDevice(reopen=Reopen(session=session)) if session else FromDevice(open=request)
            outbox.put_nowait(first.SerializeToString())
            call = method(_drain(outbox), metadata=metadata)
            try:
                async for data in call:
                    tried = time.monotonic()
                    message = FromCloud.FromString(data)
                    kind = message.WhichOneof("message")
                    if kind == "opened":
                        session = message.opened.session
                        device = device or device_for(plugin, request, message.opened.longest)
                    elif kind == "taps" and device is not None:
                        await _answer(device.receive, message.taps, outbox, traffic)
                    elif kind == "progress":
                        progress = message.progress
                        if watch is not None:
                            watch(progress)
                        if progress.done:
                            texts = [generated.text for generated in progress.generated]
                            return RemoteResult(_generations(progress), texts, traffic, progress.degraded)
                    elif kind == "refusal":
                        raise UserError(f"the cloud refuses ({message.refusal.kind}): {message.refusal.reason}")
                reason = "the stream ended"
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    raise UserError(f"the cloud does not know this device: {error.details()}") from error
                reason = error.details() or error.code().name
            except DecodeError as error:
                raise UserError("what came from the cloud is not of this protocol") from error
            finally:
                call.cancel()
            if time.monotonic() - tried > connection.patience:
                raise CloudGone(
                    f"the cloud at {connection.address} is gone ({reason}); "
                    f"{sum(len(g.tokens) for g in progress.generated)} tokens had been generated",
                    _generations(progress),
                )
            await asyncio.sleep(0.2)


async def _answer(
    receive: Callable[[Taps], object], taps: Taps, outbox: "asyncio.Queue[bytes]", traffic: Traffic
) -> None:
    began = time.perf_counter()
    correction = await asyncio.to_thread(receive, taps)
    traffic.device_seconds += time.perf_counter() - began
    if taps.prompt:
        traffic.prefill_bytes += taps.ByteSize()
        return
    traffic.exchanges += 1
    traffic.bytes_down += taps.ByteSize()
    reply = FromDevice(correction=correction).SerializeToString()  # type: ignore[arg-type]
    traffic.bytes_up += len(reply)
    outbox.put_nowait(reply)


async def _drain(outbox: "asyncio.Queue[bytes]") -> AsyncIterator[bytes]:
    while True:
        yield await outbox.get()


def _generations(progress: Progress) -> list[Generation]:
    return [Generation(list(g.tokens), list(g.consulted), g.score or None) for g in progress.generated]
