"""Milliseconds of a decode step, and of a forward without a cache: SmolLM2 in float32 on two threads.

    python -m experiments.benchmarks.decode_bench

The backbone alone, greedy and by beam search. Every shape is begun once; `REPEATS` times a few more tokens of each
shape in turn are timed, so that what disturbs the machine disturbs them all, and the medians count.
"""

import os
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments.benchmarks.output import write_result
from experiments.benchmarks.timing import BACKBONE, THREADS, decode_steps, milliseconds, use_threads
from experiments.record import print_table
from spa_jax import command
from spa_jax.models.llama import Llama
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

ROOM, REPEATS = 64, 7


class Shape(NamedTuple):
    """Prompts of some length, of each of which `steps` new tokens are decoded at a time."""

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


def forward(backbone: Backbone, rng: np.random.Generator) -> Callable[[], object]:
    """Returns a function that runs `PREFILL` tokens without a cache."""
    model, tokens = Llama(backbone.config), rng.integers(100, 40_000, PREFILL).astype(np.int32)
    positions = np.broadcast_to(np.arange(PREFILL[1], dtype=np.int32), PREFILL)
    run = jax.jit(lambda params: model.apply({"params": params}, tokens, positions).hidden)
    return lambda: run(backbone.params)


def main() -> None:
    use_threads()
    load = os.getloadavg()[0]
    backbone, rng = load_backbone(BACKBONE), np.random.default_rng(0)
    ways = {
        name: decode_steps(backbone, (shape.prompts, shape.length), shape.steps, ROOM, rng, shape.beams)
        for name, shape in SHAPES.items()
    }
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
    print_table(("", "ms a step"), [(name, f"{median:,.1f}") for name, median in medians.items()])
    found = {"load_average_before": load, "milliseconds_per_step": medians}
    write_result("decode_bench", found, threads=THREADS)


if __name__ == "__main__":
    command.run(main)
