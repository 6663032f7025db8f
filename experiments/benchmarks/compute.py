"""What each choice of `compute.*`, `dtype` and `peft.remat` is worth on this machine: SmolLM2, two threads.

    python -m experiments.benchmarks.compute --output=experiments/results/compute.json

One choice at a time is changed. Everything is compiled first; then the ways take turns, `REPEATS` times, so that what
disturbs the machine disturbs them all, and the medians count. What they change on TPUs is in
`experiments.benchmarks.compiled`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.pytorch import THREADS, use_threads
from experiments.hardware import hardware
from spa_jax import command
from spa_jax.data.pipeline import Batch
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import GREEDY
from spa_jax.files import write_json
from spa_jax.models.compute import AUTOMATIC, Compute
from spa_jax.models.llama import Remat
from spa_jax.models.peft import PeftConfig
from spa_jax.training.optimizer import OptimizerConfig, make_optimizer
from spa_jax.training.peft_recipe import PeftRecipe
from spa_jax.training.step import init_state, train_step
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

OUTPUT = flags.DEFINE_string("output", "experiments/results/compute.json", "Where to write the result.")

BACKBONE = "smollm2-135m-instruct"
FORWARD, STEP, REPEATS = (4, 512), (2, 512), 3
"""Rows and tokens of a forward pass and of a LoRA step."""
PROMPTS = {"a token of 1 prompt": (1, 5), "a token of 16 prompts": (16, 2)}
"""How many of 64 tokens, and the new tokens that are timed at a time."""
ROOM = 64


@dataclasses.dataclass(frozen=True)
class Choice:
    """What differs from the defaults."""

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
    """A pass without a cache; what it is called with is fixed."""
    model, tokens = backbone.model(), rng.integers(100, 40_000, FORWARD).astype(np.int32)
    positions = np.broadcast_to(np.arange(FORWARD[1], dtype=np.int32), FORWARD)
    hidden = jax.jit(lambda params: model.apply({"params": params}, tokens, positions).hidden)
    run, cost = compiled(hidden.lower(backbone.params))
    return lambda: run(backbone.params), cost


def lora_step(backbone: Backbone, remat: Remat, rng: np.random.Generator) -> tuple[Callable[[], object], dict]:
    """Forward, backward and AdamW, every second token a target."""
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


def decode(backbone: Backbone, count: int, steps: int, rng: np.random.Generator) -> Callable[[], object]:
    """Makes `steps` more tokens of prompts that have been run; it is called at most `REPEATS` + 1 times."""
    model = FusedModel(dataclasses.replace(backbone, eos_ids=()), None)
    state, until = model.start(rng.integers(100, 40_000, (count, 64)).tolist(), ROOM), 1

    def advance() -> object:
        nonlocal state, until
        until += steps
        state = model.advance(state, GREEDY, until)
        return state.position

    return advance


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - began)


def ways_of(choice: Choice) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Name -> what is timed, and what compiling told."""
    rng, changed = np.random.default_rng(0), choice.remat != "full"
    backbone = load_backbone(BACKBONE, jnp.dtype(choice.dtype), compute=choice.compute)
    ways: dict[str, Callable[[], object]] = {}
    costs: dict[str, Any] = {}
    ways["LoRA step"], costs["LoRA step"] = lora_step(backbone, choice.remat, rng)
    if not changed:
        ways["forward"], costs["forward"] = forward(backbone, rng)
        ways |= {name: decode(backbone, count, steps, rng) for name, (count, steps) in PROMPTS.items()}
    return ways, costs


def main() -> None:
    use_threads()
    jax.config.update("jax_enable_compilation_cache", False)  # or the time to compile would be one to read
    every = {name: ways_of(choice) for name, choice in CHOICES.items()}
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(REPEATS + 1):
        for choice, (ways, _) in every.items():
            for way, run in ways.items():
                spent = milliseconds(run)
                if repeat:  # the first compiles, or fills caches
                    times.setdefault((choice, way), []).append(spent)
    steps = {name: steps for name, (_, steps) in PROMPTS.items()}
    rows = {
        choice: {way: median(times[choice, way]) / steps.get(way, 1) for way in ways}
        for choice, (ways, _) in every.items()
    }
    show(rows, {choice: costs for choice, (_, costs) in every.items()})
    write_json(
        Path(OUTPUT.value),
        {
            "command": "python -m experiments.benchmarks.compute",
            "hardware": f"{hardware()}, {THREADS} threads",
            "forward": FORWARD,
            "lora_step": STEP,
            "milliseconds": rows,
            "compiled": {choice: costs for choice, (_, costs) in every.items()},
        },
    )


def show(rows: Mapping[str, Mapping[str, float]], costs: Mapping[str, Any]) -> None:
    """A table on the terminal."""
    ways = list(rows["defaults"])
    table = Table("ms", *ways, "LoRA MiB", "LoRA compiled in")
    for choice, row in rows.items():
        cost = costs[choice]["LoRA step"]
        told = [f"{cost['temporary_mib']:,.0f}", f"{cost['compile_seconds']:.1f} s"]
        table.add_row(choice, *(f"{row[way]:,.1f}" if way in row else "" for way in ways), *told)
    Console(width=160).print(table)


if __name__ == "__main__":
    command.run(main)
