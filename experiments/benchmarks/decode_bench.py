"""Milliseconds of a decode step, and of a forward without a cache: SmolLM2 in float32 on two threads.

    python -m experiments.benchmarks.decode_bench --output=experiments/results/decode_bench.json

The backbone alone, greedy and by beam search. Every shape is begun once; `REPEATS` times a few more tokens of each
shape in turn are timed, so that what disturbs the machine disturbs them all, and the medians count.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.pytorch import THREADS, use_threads
from experiments.hardware import hardware
from spa_jax import command
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import GREEDY
from spa_jax.files import write_json
from spa_jax.models.llama import Llama
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

OUTPUT = flags.DEFINE_string("output", "experiments/results/decode_bench.json", "Where to write the result.")

BACKBONE = "smollm2-135m-instruct"
ROOM, REPEATS = 64, 7


class Shape(NamedTuple):
    """What is decoded: prompts of some length, and `steps` new tokens of each at a time."""

    prompts: int
    length: int
    beams: int | None
    steps: int


SHAPES = {
    "1 prompt of 64": Shape(1, 64, None, 5),
    "8 prompts of 64": Shape(8, 64, None, 2),
    "16 prompts of 64": Shape(16, 64, None, 2),
    "1 prompt of 1200": Shape(1, 1200, None, 3),
    "1 prompt of 64, 4 beams": Shape(1, 64, 4, 3),
    "16 prompts of 200, 4 beams": Shape(16, 200, 4, 1),
}
PREFILL = (8, 224)


def decode(backbone: Backbone, shape: Shape, rng: np.random.Generator) -> Callable[[], object]:
    """What makes `shape.steps` more tokens of prompts that have been run; it is called at most `REPEATS` + 1 times."""
    model, beams = FusedModel(backbone, None), None if shape.beams is None else Beams(shape.beams)
    prompts = rng.integers(100, 40_000, (shape.prompts, shape.length)).tolist()
    state, until = model.start(prompts, ROOM, beams=beams), 1

    def advance() -> object:
        nonlocal state, until
        until += shape.steps
        state = model.advance(state, GREEDY, until, beams)
        return state.position

    return advance


def forward(backbone: Backbone, rng: np.random.Generator) -> Callable[[], object]:
    """What runs `PREFILL` tokens without a cache."""
    model, tokens = Llama(backbone.config), rng.integers(100, 40_000, PREFILL).astype(np.int32)
    positions = np.broadcast_to(np.arange(PREFILL[1], dtype=np.int32), PREFILL)
    run = jax.jit(lambda params: model.apply({"params": params}, tokens, positions).hidden)
    return lambda: run(backbone.params)


def milliseconds(way: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    jax.block_until_ready(way())
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    use_threads()
    load = os.getloadavg()[0]
    backbone, rng = dataclasses.replace(load_backbone(BACKBONE), eos_ids=()), np.random.default_rng(0)
    ways = {name: decode(backbone, shape, rng) for name, shape in SHAPES.items()}
    prefill = "forward of {} x {}".format(*PREFILL)
    ways[prefill] = forward(backbone, rng)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            spent = milliseconds(way)
            if repeat:  # the first compiles
                times[name].append(spent)
    steps = {name: shape.steps for name, shape in SHAPES.items()} | {prefill: 1}
    medians = {name: statistics.median(spent) / steps[name] for name, spent in times.items()}
    table = Table("", "ms a step")
    for name, median in medians.items():
        table.add_row(name, f"{median:,.1f}")
    Console().print(table)
    write_json(
        Path(OUTPUT.value),
        {
            "command": "python -m experiments.benchmarks.decode_bench",
            "hardware": f"{hardware()}, {THREADS} threads",
            "load_average_before": load,
            "milliseconds_per_step": medians,
        },
    )


if __name__ == "__main__":
    command.run(main)
