"""gRPC on a real network stack: what an exchange takes by its size, and a generation by the network's delay.

    python -m experiments.benchmarks.network --plugin=runs/quickstart/plugin

Exchanges: two processes over loopback, messages as the cloud and the device write them. Generations: two hosts
(`experiments.benchmarks.hosts`; Linux, as root, else this part is left out and says why), the time that questions are
out without the device's computing, against equation 6.
"""

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from absl import flags

from experiments.benchmarks.hosts import Link
from experiments.benchmarks.output import write_result
from experiments.benchmarks.over_link import over_link
from experiments.record import print_table
from spa_jax import command
from spa_jax.data.persona import generate as persona
from spa_jax.errors import UserError
from spa_jax.split.grpc_channel import CLOUD_OPTIONS, DEVICE_OPTIONS, METHOD, SERVICE
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Reply, Taps, Tensor
from spa_jax.weights.plugin import load_plugin

PLUGIN = flags.DEFINE_string("plugin", None, "A trained plugin, such as runs/quickstart/plugin.")

PAYLOADS, WARM, EXCHANGES, ANSWER = (3_000, 30_000, 270_000), 30, 500, 2_304
"""Bytes of a question's array, exchanges that are not and that are counted, and bytes of an answer's array."""
DELAYS, RATE, PROMPTS, NEW = (0.005, 0.02, 0.08), 1e8, 3, 40


def main() -> None:
    if PLUGIN.value is None:
        raise UserError("name a trained plugin with --plugin=DIR")
    exchanges = {str(size): exchange_seconds(size) for size in PAYLOADS}
    print_table(
        ("bytes of a question", "median ms", "99th percentile ms"),
        [(size, f"{1e3 * row['median']:.2f}", f"{1e3 * row['p99']:.2f}") for size, row in exchanges.items()],
    )
    _, held_out = persona(0)
    prompts = [pair.source for pair in held_out[:: len(held_out) // PROMPTS][:PROMPTS]]
    rows: list[dict[str, Any]] = []
    try:
        backbone = load_plugin(Path(PLUGIN.value)).backbone
        for congestion, codec in (("reno", "float32"), ("bbr", "float32"), ("bbr", "int8")):
            for delay in DELAYS:
                link = Link(delay, RATE, congestion=congestion)
                rows += over_link(link, backbone, Path(PLUGIN.value), prompts, NEW, codec)
    except UserError as error:
        print(f"generations between two hosts are left out: {error}")
    cells = []
    for row in rows:
        measured, predicted = row["measured_seconds"], row["predicted_seconds"]
        names = (str(row[key]) for key in ("congestion", "codec", "round_trip", "exchanges", "bytes_down"))
        cells.append([*names, f"{measured:.3f}", f"{predicted:.3f}", f"{measured / predicted:.2f}"])
    varied = ("congestion control", "codec", "round trip")
    print_table((*varied, "exchanges", "bytes down", "measured s", "equation 6 s", "ratio"), cells)
    found = {"exchange_seconds": exchanges, "rate": RATE, "generations": rows}
    write_result("network", found, "--plugin=runs/quickstart/plugin")


def exchange_seconds(size: int) -> dict[str, float]:
    """Returns median and 99th percentile of exchanges over loopback, between this process and another one."""
    return asyncio.run(_exchanges(size))


async def _exchanges(size: int) -> dict[str, float]:
    seconds: list[float] = []
    question = FromCloud(taps=Taps(step=1, taps=Tensor(values=np.random.default_rng(0).bytes(size))))
    finished = asyncio.Event()

    async def ask(replies: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        for _ in range(WARM + EXCHANGES):
            began = time.perf_counter()
            yield question.SerializeToString()
            FromDevice.FromString(await anext(replies))
            seconds.append(time.perf_counter() - began)
        finished.set()

    server = grpc.aio.server(options=CLOUD_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(ask)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    device = multiprocessing.get_context("spawn").Process(target=_answer, args=(port,))
    device.start()
    await finished.wait()
    await server.stop(grace=1)
    device.join()
    counted = seconds[WARM:]
    return {"median": statistics.median(counted), "p99": float(np.percentile(counted, 99))}


def _answer(port: int) -> None:
    """Answers in the device's process."""
    asyncio.run(_answers(port))


async def _answers(port: int) -> None:
    reply = Reply(step=1, g=Tensor(values=bytes(ANSWER)))
    outbox: asyncio.Queue[bytes] = asyncio.Queue()

    async def say() -> AsyncIterator[bytes]:
        while True:
            yield await outbox.get()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", DEVICE_OPTIONS) as channel:
        async for data in channel.stream_stream(f"/{SERVICE}/{METHOD}")(say()):
            FromCloud.FromString(data)
            outbox.put_nowait(FromDevice(reply=reply).SerializeToString())


if __name__ == "__main__":
    command.run(main)
