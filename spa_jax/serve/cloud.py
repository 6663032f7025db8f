"""The cloud, which serves devices until it is told to stop."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Coroutine
from typing import Any, cast

import jax

from spa_jax import compilation_cache
from spa_jax.engine.layouts import lay_out
from spa_jax.errors import UserError
from spa_jax.models.compute import Compute, Weights
from spa_jax.serve.cloud_flags import (
    BACKBONE,
    DRAIN,
    DTYPE,
    HOST,
    METRICS_HOST,
    METRICS_PORT,
    PRECISION,
    TENSOR,
    UNTIL_INPUT_ENDS,
    WARM,
    read_address,
    read_limits,
    read_security,
)
from spa_jax.split import metrics
from spa_jax.split.server import serving
from spa_jax.split.session import Cloud
from spa_jax.training.sharding import MeshConfig, MeshPartitioner, make_mesh
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone


def main() -> None:
    """Serves devices, and logs in JSON."""
    compilation_cache.keep_programs()
    lines = logging.getLogger("spa_jax").handlers[0]
    lines.setFormatter(JsonLines())
    logging.getLogger().handlers[:] = [lines]  # what gRPC and asyncio say too
    logging.captureWarnings(True)
    asyncio.run(run_cloud())


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": record.created, "level": record.levelname, "logger": record.name}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({**entry, "message": record.getMessage()})


def load_sharded() -> Backbone:
    """Loads the backbone over the first `--tensor` devices.

    Raises:
        UserError: there are not so many devices, or the heads cannot be divided among them.
    """
    devices = jax.devices()
    if TENSOR.value > len(devices):
        raise UserError(f"--tensor={TENSOR.value}, but this machine has {len(devices)} devices")
    partitioner = MeshPartitioner(make_mesh(MeshConfig(1, 1, TENSOR.value, 1), 1, devices[: TENSOR.value]))
    return load_backbone(BACKBONE.value, DTYPE.value, partitioner, Compute(weights=cast(Weights, PRECISION.value)))


async def run_until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Does some work, unless an event comes before its end."""
    tasks = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if tasks[0].done():
        tasks[0].result()
    for task in tasks:
        task.cancel()


async def run_cloud() -> None:
    """Serves devices until a signal, or with `--until_input_ends` the end of standard input."""
    security, address, limits = read_security(), read_address(), read_limits()
    if METRICS_PORT.value:
        metrics.serve(METRICS_HOST.value or HOST.value, METRICS_PORT.value)
    cloud = Cloud(lay_out(load_sharded()))
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    has_input_ended = False
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)

    def stop_at_end_of_input() -> None:
        nonlocal has_input_ended
        if not os.read(0, 4096):
            loop.remove_reader(0)
            has_input_ended = True
            stop.set()

    if UNTIL_INPUT_ENDS.value:
        loop.add_reader(0, stop_at_end_of_input)
    async with serving(cloud, address, limits, security) as (service, port):
        if WARM.value:
            await run_until(stop, service.warm(WARM.value))
        if not stop.is_set():
            print(f"serving on port {port}", flush=True)
        await stop.wait()
        if not has_input_ended:
            await service.drain(DRAIN.value)
