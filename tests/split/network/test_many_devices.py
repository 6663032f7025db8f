"""A thousand devices at one cloud: nothing of them is lost, and nothing of them is left."""

import asyncio
import ctypes
import gc
import itertools
import random
import sys
import time
from pathlib import Path

import grpc
import pytest
from streams import Stream, metric
from tiny_split import random_plugin

from spa_jax.engine.group import Group
from spa_jax.split.client import merge_progress
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import ServerSecurity
from spa_jax.split.messages_pb2 import Cancel, FromDevice, Progress, Reopen
from spa_jax.split.request import device_for, open_message
from spa_jax.split.server import Limits, serving
from spa_jax.split.server_session import ServerSession
from spa_jax.split.session import Session

DEVICES, COUNTED, AT_ONCE, CHANNELS, NEW, SHORTEST = 1000, 200, 100, 8, 5, 3
LONGEST = 64
"""Tokens of a prompt and its answer."""
KINDS = ("honest", "honest", "honest", "honest", "reconnects", "cancels", "is gone")


def alive():
    gc.collect()
    return [kept for kept in gc.get_objects() if isinstance(kept, Session | ServerSession | Group)]


def resident():
    """The memory of this process, in bytes, without what the allocator could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


class Device:
    """One that answers, and at a step of its own does what its kind does."""

    def __init__(self, channels, plugin, request, token, kind):
        self.channels, self.plugin, self.request, self.kind = channels, plugin, request, kind
        self.header = [("authorization", f"Bearer {token}")]
        self.at = random.randrange(1, SHORTEST)

    def stream(self, first):
        return Stream(random.choice(self.channels), first, self.header)

    async def run(self, turn):
        """Returns, when it has had its turn, all that is generated; None of one that does not stay."""
        async with turn:
            return await self.generate()

    async def generate(self):
        stream, progress, device, session = self.stream(FromDevice(open=self.request)), Progress(), None, ""
        while (message := await stream.receive()) is not None:
            assert not message.HasField("refusal"), message.refusal.reason
            if message.HasField("progress"):
                progress = merge_progress(progress, message.progress)
                if progress.done:
                    stream.call.cancel()
                    return progress
            if message.HasField("opened"):
                session = message.opened.session
                device = device or device_for(self.plugin, self.request, list(message.opened.lengths))
            elif message.HasField("taps"):
                stream.send(FromDevice(reply=device.receive(message.taps)))
                if message.taps.step != self.at or self.kind == "honest":
                    continue
                if self.kind == "cancels":
                    stream.send(FromDevice(cancel=Cancel()))
                    while await stream.receive() is not None:
                        pass
                    return None
                stream.call.cancel()
                if self.kind == "is gone":
                    return None
                self.kind = "honest"
                stream = self.stream(FromDevice(reopen=Reopen(session=session, step=self.at)))
        raise AssertionError("the stream ended before all was generated")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_a_thousand_devices_nothing_is_lost_and_nothing_is_left(cloud, backbone, tmp_path):
    (tmp_path / "tokens").write_text("".join(f"device {number}\n" for number in range(DEVICES)))
    cloud.engine.slots.bound(2**27)
    for _ in cloud.engine.warm(LONGEST):  # what is compiled midway would count as growth
        pass
    cases = []
    for seed in range(6):
        plugin = random_plugin(backbone, "s1", seed=seed)
        request = open_message(plugin, [f"What is thing {seed}?"], NEW)
        cases.append((plugin, request, [g.tokens for g in in_process(cloud, plugin, request).generations]))
        assert min(map(len, cases[-1][2])) >= SHORTEST, "a device could be over before it does what its kind does"
    sessions, sizes = metric("spa_sessions"), []
    others = alive()  # of clouds of other tests
    random.seed(0)

    async def main():
        limits = Limits(deadline=60, linger=5, abandoned=20, open_seconds=120, queue_seconds=600)
        security = ServerSecurity(tokens=f"{tmp_path}/tokens")
        async with serving(cloud, "127.0.0.1:0", limits, security) as (service, port):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(CHANNELS)]
            turn = asyncio.Semaphore(AT_ONCE)  # gRPC accepts one stream in each round of the loop, which they share
            for first in range(0, DEVICES, COUNTED):
                numbers = range(first, first + COUNTED)
                devices = [
                    Device(channels, *cases[number % len(cases)][:2], f"device {number}", KINDS[number % len(KINDS)])
                    for number in numbers
                ]
                found = await asyncio.gather(*(device.run(turn) for device in devices))
                for number, progress in zip(numbers, found):
                    if KINDS[number % len(KINDS)] in ("honest", "reconnects"):
                        assert [list(each.tokens) for each in progress.generated] == cases[number % len(cases)][2]
                        assert progress.degraded == 0
                    else:
                        assert progress is None
                while metric("spa_sessions") > sessions or service._sessions._by_name:
                    await asyncio.sleep(0.05)
                del devices, found
                sizes.append(resident())
            for channel in channels:
                await channel.close()
            await asyncio.sleep(0.2)
            assert not service.admission._inside
            assert not service.admission._waiting
            assert [room.taken for room in (service._silent, service._planned, service._guessing)] == [0, 0, 0]
            await service._sessions.run_program(cloud.engine.turn)
            prefixes = len(cloud.engine.prefixes._by_use)
            assert cloud.engine.slots.taken == 64 * prefixes
            return [type(kept).__name__ for kept in alive() if not any(kept is other for other in others)]

    began = time.monotonic()
    left = asyncio.run(main())
    print(f"{time.monotonic() - began:.0f} s, MiB: {[round(size / 2**20, 1) for size in sizes]}")
    assert left == []
    assert sizes[-1] < 1.03 * sizes[1], sizes
    assert sizes[-1] < sizes[1] + 2**24, sizes  # the cache is among the sizes
    growths = [after - before for before, after in itertools.pairwise(sizes)]
    assert min(growths) < 2**20, f"each {COUNTED} devices leave {growths} bytes"
