"""Tokens per second of many devices at one cloud, against one batched program of as many prompts.

    python -m experiments.benchmarks.engine

SmolLM2 in float32 with a random plugin that is always asked, or the backbone alone. The cloud is a process of its own
and the devices are tasks of this one, which share a compiled side network. Each number of devices is run once to
compile, then `REPEATS` times in turn with the fused program, always with prompts that nobody has asked before, and the
medians count: the rate of all devices together, its share of the program's in the same turn, the time to the first
token, and that between two messages with tokens.
Since the devices take a part of the same cores, the processor time of a token is told apart: the cloud's, the devices'
and the fused program's.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator

import numpy as np
import psutil
from absl import flags

from experiments.benchmarks.devices import Device, percentiles
from experiments.benchmarks.output import write_result
from experiments.benchmarks.timing import BACKBONE, make_plugin
from experiments.record import print_table
from spa_jax import command
from spa_jax.decoding.fused import FusedModel
from spa_jax.models.combine import Setting
from spa_jax.models.llama import Entry
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import LocalCloud, cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.request import open_message
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8", "16", "32"], "Numbers of devices.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each that count.", lower_bound=1)
LENGTH, NEW = 64, 32
ENTRIES: tuple[Entry, ...] = ("head", 18)


def measure(
    backbone: Backbone, plugin: Plugin, setting: Setting, cloud: LocalCloud, rng: np.random.Generator
) -> Iterator[dict[str, object]]:
    """Measures every number of devices."""
    model, process = FusedModel(backbone, plugin, setting, 0.0), psutil.Process(cloud.process.pid)

    async def together(prompts: list[list[int]]) -> list[Device]:
        async def one(prompt: list[int]) -> Device:
            device, request = Device(), open_message(plugin, [prompt], NEW, setting=setting, threshold=0.0)
            await generate(Connection(cloud.address), plugin, request, device.see)
            return device

        return await asyncio.gather(*map(one, prompts))

    for count in map(int, DEVICES.value):
        rates: dict[str, list[float]] = {"devices": [], "fused": []}
        cpu: dict[str, list[float]] = {"cloud": [], "devices": [], "fused": []}
        first, between, seen = [], [], []
        for repeat in range(REPEATS.value + 1):
            prompts = rng.integers(100, 40_000, (count, LENGTH)).tolist()
            times = [_times(process)]
            seen = asyncio.run(together(prompts))
            times.append(_times(process))
            fused = model.generate(prompts, NEW)
            times.append(_times(process))
            if not repeat:
                continue
            of_devices, of_fused = np.diff(times, axis=0)  # of each: seconds, of the cloud's processors, and of ours
            tokens, fused_tokens = sum(device.tokens for device in seen), sum(len(each.tokens) for each in fused)
            rates["devices"].append(tokens / of_devices[0])
            rates["fused"].append(fused_tokens / of_fused[0])
            cpu["cloud"].append(of_devices[1] / tokens)
            cpu["devices"].append(of_devices[2] / tokens)
            cpu["fused"].append(of_fused[2] / fused_tokens)
            first += [device.came_at[0] - device.opened_at for device in seen]
            between += [float(gap) for device in seen for gap in np.diff(device.came_at)]
        medians = {name: statistics.median(values) for name, values in rates.items()}
        yield {
            "devices": count,
            "tokens_per_second": medians["devices"],
            "fused_tokens_per_second": medians["fused"],
            "share_of_fused": statistics.median(own / one for own, one in zip(rates["devices"], rates["fused"])),
            "seconds_to_first_token": percentiles(first),
            "seconds_between_tokens": percentiles(between),
            "cpu_ms_per_token": {name: 1000 * statistics.median(values) for name, values in cpu.items()},
        }


def _times(process: psutil.Process) -> tuple[float, float, float]:
    """Returns seconds on a clock, and those that processors have worked for that process and for this one."""
    used = process.cpu_times()
    return time.perf_counter(), used.user + used.system, time.process_time()


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {number:.3f}" for name, number in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    backbone = load_backbone(BACKBONE)
    found: dict[str, list[dict[str, object]]] = {}
    rng = np.random.default_rng(1)
    with cloud_process(backbone.name, "--deadline=30", "--first_deadline=60", f"--warm={2 * LENGTH}") as cloud:
        for entry in ENTRIES:
            plugin = make_plugin(backbone, entry)
            settings: tuple[Setting, ...] = ("base", "spa") if entry == "head" else ("spa",)
            for setting in settings:
                name = f"{setting} at {entry}"
                found[name] = list(measure(backbone, plugin, setting, cloud, rng))
                rows = [tuple(map(_shown, each.values())) for each in found[name]]
                print_table(
                    (name, "tokens/s", "fused", "share", "s to first token", "s between", "CPU ms a token"), rows
                )
    write_result("engine", {"length": LENGTH, "new": NEW, "measured": found})


if __name__ == "__main__":
    command.run(main)
