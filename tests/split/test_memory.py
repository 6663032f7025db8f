"""The memory of a cloud's process does not grow with the sessions it has seen."""

import asyncio
import re

import grpc
import psutil
import pytest
from tiny_split import random_plugin

from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.grpc_channel import DEVICE_OPTIONS, METHOD, SERVICE
from spa_jax.split.messages_pb2 import FromCloud, FromDevice
from spa_jax.split.request import open_message
from spa_jax.weights.registry import load_backbone

AT_ONCE = 10
COUNTS = (500, 1000, 1500)  # by the first, all programs are compiled and the allocator has what it needs


async def _open_and_drop(channel, request):
    """Opens a session, and is gone."""

    async def say():
        yield FromDevice(open=request).SerializeToString()
        await asyncio.sleep(60)

    call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(say())
    kind = "working"
    while kind == "working":
        heard = await call.read()
        assert heard is not grpc.aio.EOF, await call.details()
        kind = FromCloud.FromString(heard).WhichOneof("message")
    assert kind == "opened", FromCloud.FromString(heard)
    call.cancel()


@pytest.mark.slow
def test_dropped_sessions_leave_nothing_behind(tiny_backbone_directory, tmp_path):
    backbone = load_backbone(str(tiny_backbone_directory))
    request = open_message(random_plugin(backbone, "s1"), ["What is thing 1?"], 4)
    log = tmp_path / "log"

    async def drop_until(count, port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", DEVICE_OPTIONS) as channel:
            while (done := over()) < count:
                await asyncio.gather(*(_open_and_drop(channel, request) for _ in range(AT_ONCE)))
                while over() < done + AT_ONCE:
                    await asyncio.sleep(0.05)

    def over():
        return len(re.findall(r"session \w+: [1-4] tokens, [1-4] degraded", log.read_text(encoding="utf-8")))

    with cloud_process(backbone.name, "--deadline=0.05", "--first_deadline=0.05", "--linger=0.05", log=log) as cloud:
        process, sizes = psutil.Process(cloud.process.pid), []
        for count in COUNTS:
            asyncio.run(drop_until(count, cloud.port))
            sizes.append(process.memory_info().rss)
        assert over() == COUNTS[-1]
    print(f"MiB after {COUNTS} sessions: {[round(size / 2**20, 1) for size in sizes]}")
    assert sizes[2] < 1.02 * sizes[1], sizes  # 16 KiB a session
