"""The worth of each choice of `compute.*`, `dtype` and `peft.remat` on this machine: SmolLM2, two threads.

    python -m experiments.benchmarks.compute

One choice at a time is changed. Everything is compiled first; then the ways take turns, `REPEATS` times, so that what
disturbs the machine disturbs them all, and the medians count. What they change on TPUs is in
`experiments.benchmarks.compiled`.
"""

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.output import write_result
from experiments.benchmarks.timing import BACKBONE, THREADS, decode_steps, milliseconds, use_threads
from experiments.record import print_table
from spa_jax import command
from spa_jax.data.pipeline import Batch
from spa_jax.models.compute import AUTOMATIC, Compute
from spa_jax.models.llama import Remat
from spa_jax.models.peft import PeftConfig
from spa_jax.training.optimizer import OptimizerConfig, make_optimizer
from spa_jax.training.peft_recipe import PeftRecipe
from spa_jax.training.step import init_state, train_step
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

FORWARD, STEP, REPEATS = (4, 512), (2, 512), 3
"""Rows and tokens of a forward pass and of a LoRA step."""
PROMPTS = {"a token of 1 prompt": (1, 5), "a token of 16 prompts": (16, 2)}
"""How many of 64 tokens, and the new tokens that are timed at a time."""
ROOM = 64


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to compute that differs from the defaults."""

    compute: Compute = AUTOMATIC
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "full"


CHOICES = {
    "defaults": Choice(),
    "compute.attention=xla": Choice(Compute("xla")),
    "compute.unroll=2": Choice(Compute(unroll=2)),
    "compute.unroll=5": Choice(Compute(unroll=5)),
    "compute.unroll=30": Choice(Compute(unroll=30)),
    "compute.weights=int8": Choice(Compute(weights="int8")),
    "dtype=bfloat16": Choice(dtype="bfloat16"),
    "peft.remat=dots": Choice(remat="dots"),
    "peft.remat=none": Choice(remat="none"),
}
LORA = PeftConfig("lora", 24, 48.0)


def forward(backbone: Backbone, rng: np.random.Generator) -> tuple[Callable[[], object], dict[str, float]]:
    """Returns a function that runs a pass without a cache, and what compiling it took."""
    model, tokens = backbone.model(), rng.integers(100, 40_000, FORWARD).astype(np.int32)
    positions = np.broadcast_to(np.arange(FORWARD[1], dtype=np.int32), FORWARD)
    hidden = jax.jit(lambda params: model.apply({"params": params}, tokens, positions).hidden)
    run, cost = compiled(hidden.lower(backbone.params))
    return lambda: run(backbone.params), cost


def lora_step(backbone: Backbone, remat: Remat, rng: np.random.Generator) -> tuple[Callable[[], object], dict]:
    """Returns a function that takes a step, every second token a target, and what compiling it took."""
    rows, length = STEP
    targets = length // 2
    tokens = rng.integers(100, 40_000, (rows, length + 1)).astype(np.int32)
    predict = np.broadcast_to(np.arange(0, length, 2, dtype=np.int32), (rows, targets))
    batch = Batch(
        tokens[:, :-1], np.full(rows, length, np.int32), predict, tokens[:, 1::2], np.ones((rows, targets), np.float32)
    )
    optimizer = make_optimizer(OptimizerConfig(1e-3, 0.0, 0.1, 0.01, 1.0, 0.9, 0.999), 100)
    recipe = PeftRecipe(LORA, remat)
    state = init_state(recipe.init_params(backbone), optimizer)
    static = (recipe, recipe.model(backbone), optimizer, 1)
    run, cost = compiled(train_step.lower(*static, state, backbone.params, batch))

    def once() -> object:
        nonlocal state
        state, sums = run(state, backbone.params, batch)
        return sums

    return once, cost


def compiled(lowered: jax.stages.Lowered) -> tuple[Any, dict[str, float]]:
    """Returns the program, the seconds that compiling took, and the MiB that it holds beside arguments and results."""
    began = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    assert memory is not None
    return program, {"compile_seconds": seconds, "temporary_mib": memory.temp_size_in_bytes / 2**20}


def timed_programs(choice: Choice) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Returns, by name, the calls to time and what compiling each took."""
    rng, changed = np.random.default_rng(0), choice.remat != "full"
    backbone = load_backbone(BACKBONE, jnp.dtype(choice.dtype), compute=choice.compute)
    ways: dict[str, Callable[[], object]] = {}
    costs: dict[str, Any] = {}
    ways["LoRA step"], costs["LoRA step"] = lora_step(backbone, choice.remat, rng)
    if not changed:
        ways["forward"], costs["forward"] = forward(backbone, rng)
        ways |= {
            name: decode_steps(backbone, (count, 64), steps, ROOM, rng) for name, (count, steps) in PROMPTS.items()
        }
    return ways, costs


def main() -> None:
    use_threads()
    jax.config.update("jax_enable_compilation_cache", False)  # or the time to compile would be one to read
    every = {name: timed_programs(choice) for name, choice in CHOICES.items()}
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(REPEATS + 1):
        for choice, (ways, _) in every.items():
            for way, run in ways.items():
                took = milliseconds(run)
                if repeat:  # the first compiles, or fills caches
                    times.setdefault((choice, way), []).append(took)
    steps = {name: steps for name, (_, steps) in PROMPTS.items()}
    rows = {
        choice: {way: median(times[choice, way]) / steps.get(way, 1) for way in ways}
        for choice, (ways, _) in every.items()
    }
    costs = {choice: cost for choice, (_, cost) in every.items()}
    titles, cells = list(rows["defaults"]), []
    for choice, row in rows.items():
        memory, seconds = (costs[choice]["LoRA step"][key] for key in ("temporary_mib", "compile_seconds"))
        spent = [f"{row[way]:,.1f}" if way in row else "" for way in titles]
        cells.append([choice, *spent, f"{memory:,.0f}", f"{seconds:.1f} s"])
    print_table(("ms", *titles, "LoRA MiB", "LoRA compiled in"), cells, 160)
    found = {"forward": FORWARD, "lora_step": STEP, "milliseconds": rows, "compiled": costs}
    write_result("compute", found, threads=THREADS)


if __name__ == "__main__":
    command.run(main)
