"""Tokens per second of cloud and device as two programs, and in two processes, against one.

    python -m experiments.benchmarks.split_speed --plugin=runs/quickstart/plugin

Batch 1, greedy, the prompt's time included, each way in turn `REPEATS` times and the medians of all; the first, which
compiles, is not counted. Also counts the tokens in which one program and two differ.
"""

import asyncio
import functools
import statistics
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

from absl import flags

from experiments.benchmarks.output import write_result
from experiments.record import print_table
from spa_jax import command
from spa_jax.data.persona import generate as persona
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.encoders import prompt_encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.split import client
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate
from spa_jax.split.head import Head, head_of
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.weights.plugin import Plugin, load_plugin
from spa_jax.weights.registry import load_backbone

PLUGIN = flags.DEFINE_string("plugin", None, "A trained plugin, such as runs/quickstart/plugin.")

PROMPTS, NEW, REPEATS = 6, 40, 18


def main() -> None:
    if PLUGIN.value is None:
        raise UserError("name a trained plugin with --plugin=DIR")
    plugin = load_plugin(Path(PLUGIN.value))
    with cloud_process(plugin.backbone, "--deadline=30") as process:
        measure(plugin, process.address)


def measure(plugin: Plugin, address: str) -> None:
    """Times each way in turn, the gRPC one with the cloud at that address."""
    backbone = load_backbone(plugin.backbone)
    encoder = prompt_encoder(backbone, plugin)
    _, held_out = persona(0)
    prompts = [encoder.prompt(pair.source) for pair in held_out[:: len(held_out) // PROMPTS][:PROMPTS]]
    base, spa, cloud = FusedModel(backbone, None), FusedModel(backbone, plugin), Cloud(backbone)
    beams = Beams(4)

    def fused(model: FusedModel, search: Beams | None, prompt: list[int]) -> list[int]:
        return model.generate([prompt], NEW, beams=search)[0].tokens

    def split(search: Beams | None, prompt: list[int]) -> list[int]:
        return generate(cloud, plugin, open_message(plugin, [prompt], NEW, beams=search)).generations[0].tokens

    def token(head: Head, prompt: list[int]) -> list[int]:
        request = open_message(plugin, [prompt], NEW, reply="token")
        return generate(cloud, plugin, request, head=head).generations[0].tokens

    def remote(address: str, prompt: list[int]) -> list[int]:
        request = open_message(plugin, [prompt], NEW)
        return asyncio.run(client.generate(Connection(address), plugin, request)).generations[0].tokens

    ways: dict[str, Callable[[list[int]], list[int]]] = {
        "base": functools.partial(fused, base, None),
        "spa, one program": functools.partial(fused, spa, None),
        "spa, in-process channel": functools.partial(split, None),
        "spa, in-process channel, token": functools.partial(token, head_of(backbone)),
        "spa, in-process channel, token, int8 head": functools.partial(token, head_of(backbone, "int8")),
        "spa, gRPC on loopback": functools.partial(remote, address),
        "spa, one program, beam 4": functools.partial(fused, spa, beams),
        "spa, in-process channel, beam 4": functools.partial(split, beams),
    }
    said: dict[str, list[list[int]]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in prompts:
        for name, way in ways.items():
            said[name].append(way(prompt))
    for repeat in range(REPEATS):
        prompt = prompts[repeat % len(prompts)]
        for name, way in ways.items():
            began = time.perf_counter()
            tokens = way(prompt)
            rates[name].append(len(tokens) / (time.perf_counter() - began))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    differing = {
        name: sum(a != b for one, two in zip(said[reference], said[name]) for a, b in zip_longest(one, two))
        for reference, name in (
            ("spa, one program", "spa, in-process channel"),
            ("spa, one program", "spa, in-process channel, token"),
            ("spa, one program", "spa, in-process channel, token, int8 head"),
            ("spa, one program", "spa, gRPC on loopback"),
            ("spa, one program, beam 4", "spa, in-process channel, beam 4"),
        )
    }
    print_table(("way", "tokens per second"), [(name, f"{rate:.1f}") for name, rate in medians.items()])
    print(f"differing tokens: {differing}")
    compared = sum(map(len, said["spa, in-process channel"]))
    found = {"tokens_per_second": medians, "differing_tokens": differing, "compared_tokens": compared}
    write_result("split_speed", found, "--plugin=runs/quickstart/plugin")


if __name__ == "__main__":
    command.run(main)
