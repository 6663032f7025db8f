"""Devices by hand, and a server in this process for them."""

import asyncio
import contextlib

import grpc

from spa_jax.split import metrics
from spa_jax.split.grpc_channel import METHOD, SERVICE, ServerSecurity
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Progress
from spa_jax.split.request import device_for
from spa_jax.split.server import Limits, serving
from spa_jax.split.trust import merge_progress

metric = metrics.REGISTRY.get_sample_value
"""Name of a sample -> its value."""


def run(cloud, scenario, limits=None, security=None):
    """Runs `scenario(port)` beside a server in this process."""

    async def main():
        async with serving(cloud, "127.0.0.1:0", limits or Limits(deadline=30), security or ServerSecurity()) as (
            _,
            port,
        ):
            return await asyncio.wait_for(scenario(port), 600)

    return asyncio.run(main())


class Stream:
    """A device by hand.

    One that expects to be turned away for its token has no first message: gRPC's client says INTERNAL where a message
    is on its way when the stream ends.
    """

    def __init__(self, channel, first=None, metadata=None):
        self.outbox = asyncio.Queue()
        if first is not None:
            self.send(first)
        self.call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._drain(), metadata=metadata)
        self.call.add_done_callback(lambda _: self.outbox.put_nowait(None))

    def send(self, message):
        self.outbox.put_nowait(message if isinstance(message, bytes) else message.SerializeToString())

    async def receive(self):
        """Returns the next message but signs of life, which come when the cloud is slow; None at the end."""
        while (data := await self.call.read()) is not grpc.aio.EOF:
            message = FromCloud.FromString(data)
            if not message.HasField("working"):
                return message
        return None

    async def _drain(self):
        while (message := await self.outbox.get()) is not None:
            yield message


@contextlib.asynccontextmanager
async def connected(port):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


async def by_hand(port, plugin, request, answer, other=None):
    """Answers each question with what `answer(taps, honest correction)` makes of it; returns the last progress."""
    async with connected(port) as channel:
        stream, device, progress = Stream(channel, FromDevice(open=request)), None, Progress()
        while (message := await stream.receive()) is not None:
            if message.HasField("opened"):
                device = device_for(plugin, request, list(message.opened.lengths))
            if message.HasField("taps"):
                honest = device.receive(message.taps)
                for reply in answer(message.taps, honest):
                    stream.send(reply)
            if message.HasField("progress"):
                progress = merge_progress(progress, message.progress)
                if progress.done:
                    return progress
            assert not message.HasField("refusal"), message.refusal.reason
    return None


def tokens_of(progress):
    return [list(generated.tokens) for generated in progress.generated]
