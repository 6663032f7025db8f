"""Seconds to the first token of devices whose prompts begin alike, with and without sharing what these begin with, and
the share of all tokens of prompts that were not run, since others had run them.

    python -m experiments.benchmarks.prefixes

As `experiments.benchmarks.engine`: SmolLM2 in float32 with a random plugin at `head` that is always asked, the cloud in
a process of its own, the devices tasks of this one, which all open at once. In every run the prompts begin with another
prefix, which nobody has sent before. One run compiles, `REPEATS` count.
"""

import asyncio
import itertools
import statistics
import urllib.request

import numpy as np
from absl import flags
from prometheus_client.parser import text_string_to_metric_families

from experiments.benchmarks.devices import Device, percentiles
from experiments.benchmarks.output import write_result
from experiments.benchmarks.ports import free_port
from experiments.benchmarks.timing import BACKBONE, make_plugin
from experiments.record import print_table
from spa_jax import command
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.grpc_channel import SharePrefixes
from spa_jax.split.messages_pb2 import Open
from spa_jax.split.request import open_message
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

DEVICES = flags.DEFINE_integer("devices", 16, "Devices that open at once.", lower_bound=1)
PREFIX = flags.DEFINE_integer("prefix", 512, "Tokens that all prompts of a run begin with.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs that count.", lower_bound=1)
OWN, NEW = 16, 8


def measure(plugin: Plugin, address: str) -> list[float]:
    """Returns the seconds to the first token of every device of every run."""
    rng, found = np.random.default_rng(0), []

    async def one(request: Open) -> float:
        device = Device()
        await generate(Connection(address, queue_seconds=600.0), plugin, request, device.see)
        return device.came_at[0] - device.opened_at

    async def together(requests: list[Open]) -> list[float]:
        return await asyncio.gather(*map(one, requests))

    for repeat in range(REPEATS.value + 1):
        prefix = rng.integers(100, 40_000, PREFIX.value).tolist()
        own = rng.integers(100, 40_000, (DEVICES.value, OWN)).tolist()
        requests = [open_message(plugin, [[*prefix, *each]], NEW, threshold=0.0) for each in own]
        seconds = asyncio.run(together(requests))
        found.append(seconds if repeat else [])
    return list(itertools.chain(*found))


def count_reused(port: int) -> float:
    """Reads from the cloud's metrics how many tokens of prompts others had run."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    return next(sample.value for family in families for sample in family.samples if "prefix_tokens" in sample.name)


def main() -> None:
    backbone = load_backbone(BACKBONE)
    plugin, measured = make_plugin(backbone, "head"), {}
    choices: tuple[SharePrefixes, ...] = ("all", "none")
    for share in choices:
        port = free_port()
        how = "--deadline=30", "--first_deadline=120", "--queue_seconds=600", f"--metrics_port={port}"
        with cloud_process(backbone.name, *how, f"--share_prefixes={share}") as cloud:
            seconds = measure(plugin, cloud.address)
            reused = count_reused(port) / ((REPEATS.value + 1) * DEVICES.value * (PREFIX.value + OWN))
        measured[share] = {"mean": statistics.mean(seconds), **percentiles(seconds), "share_reused": reused}
    rows = [(share, *(f"{value:.2f}" for value in found.values())) for share, found in measured.items()]
    print_table(("share_prefixes", "mean s to first token", "p50", "p95", "share of tokens reused"), rows)
    write_result("prefixes", {"prefix": PREFIX.value, "devices": DEVICES.value, "seconds_to_first_token": measured})


if __name__ == "__main__":
    command.run(main)
