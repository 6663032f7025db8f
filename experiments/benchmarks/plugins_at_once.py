"""A cloud's memory and throughput with a plugin of its own for every session, against one plugin for all of them.

    python -m experiments.benchmarks.plugins_at_once

SmolLM2 in float32. The plugins enter at the default block, correct the prompt, and are always asked; they differ in
their routers, which are what the cloud gets of them, and share a side network, which is a device's matter. The cloud is
a process of its own and the devices are tasks of this one, `--at_once` of them at a time. Blocks of `--block` sessions
with one plugin and with as many new ones take turns, after one block of each that does not count.
"""

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np
import psutil
from absl import flags

from experiments.benchmarks.output import write_result
from experiments.benchmarks.timing import BACKBONE, make_plugin
from experiments.record import print_table
from spa_jax import command
from spa_jax.models.plugin import parse_entry
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import LocalCloud, cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.request import open_message
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

PLUGINS = flags.DEFINE_integer("plugins", 1000, "Plugins of a session each, and sessions of the one.", lower_bound=1)
BLOCK = flags.DEFINE_integer("block", 100, "Sessions in a row of one kind.", lower_bound=1)
AT_ONCE = flags.DEFINE_integer("at_once", 16, "Sessions at a time.", lower_bound=1)
LENGTH, NEW = 16, 8


def with_router(plugin: Plugin, rng: np.random.Generator) -> Plugin:
    """Returns the plugin with a random router of its own."""
    kernel = np.float32(rng.standard_normal(plugin.params["router"]["kernel"].shape))
    return dataclasses.replace(plugin, params=plugin.params | {"router": {"kernel": kernel}})


async def run_block(address: str, plugins: Sequence[Plugin], prompts: Sequence[list[int]]) -> float:
    """Runs a session for each plugin and its prompt, and returns the tokens per second of all together."""
    room = asyncio.Semaphore(AT_ONCE.value)
    requests = [open_message(plugin, [prompt], NEW, threshold=0.0) for plugin, prompt in zip(plugins, prompts)]

    async def one(index: int) -> int:
        async with room:
            result = await generate(Connection(address), plugins[index], requests[index])
        return len(result.generations[0].tokens)

    began = time.perf_counter()
    tokens = await asyncio.gather(*map(one, range(len(plugins))))
    return sum(tokens) / (time.perf_counter() - began)


def measure(plugin: Plugin, cloud: LocalCloud, vocabulary: int) -> dict[str, dict[str, float]]:
    """Returns tokens per second (median of blocks) and the bytes by which the cloud grew, for one plugin and many."""
    rng, process = np.random.default_rng(0), psutil.Process(cloud.process.pid)
    rates: dict[str, list[float]] = {"one": [], "many": []}
    grown = dict.fromkeys(rates, 0)
    for number in range(-1, max(1, PLUGINS.value // BLOCK.value)):
        for kind in rates:
            plugins = [with_router(plugin, rng) if kind == "many" else plugin for _ in range(BLOCK.value)]
            prompts = rng.integers(vocabulary // 100, vocabulary, (BLOCK.value, LENGTH)).tolist()
            before = process.memory_info().rss
            rate = asyncio.run(run_block(cloud.address, plugins, prompts))
            if number >= 0:
                rates[kind].append(rate)
                grown[kind] += process.memory_info().rss - before
    return {
        kind: {
            "sessions": len(rates[kind]) * BLOCK.value,
            "tokens_per_second": statistics.median(rates[kind]),
            "bytes_a_session": grown[kind] / (len(rates[kind]) * BLOCK.value),
        }
        for kind in rates
    }


def main() -> None:
    backbone = load_backbone(BACKBONE)
    plugin = make_plugin(backbone, parse_entry("middle", backbone.config), "all")
    deadlines = "--deadline=30", "--first_deadline=60"
    with cloud_process(backbone.name, *deadlines, f"--warm={2 * (LENGTH + NEW)}") as cloud:
        process = psutil.Process(cloud.process.pid)
        before = process.memory_info().rss
        found = measure(plugin, cloud, backbone.config.vocab_size)
        after = process.memory_info().rss
    share = found["many"]["tokens_per_second"] / found["one"]["tokens_per_second"]
    rows = [(kind, *(f"{value:,.1f}" for value in row.values())) for kind, row in found.items()]
    print_table(("plugins", "sessions", "tokens/s", "bytes of cloud a session"), rows)
    print(f"many plugins have {share:.3f} of one plugin's rate")
    print(f"the cloud has {before / 2**20:.0f} MiB before all sessions, and {after / 2**20:.0f} MiB after them")
    sizes = {"at_once": AT_ONCE.value, "length": LENGTH, "new": NEW, "block": BLOCK.value}
    resident = {"before": before, "after": after}
    write_result("plugins_at_once", {**sizes, "measured": found, "share_of_rate": share, "resident_bytes": resident})


if __name__ == "__main__":
    command.run(main)
