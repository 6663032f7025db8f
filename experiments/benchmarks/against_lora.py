"""Training a plugin against training LoRA with PEFT in PyTorch: the same backbone, rows, lengths and threads.

    python -m experiments.benchmarks.against_lora --data=DIR --output=experiments/results/against_lora.json

DIR as of `experiments.sciq`. Medians of 30 steps of 8 rows after 3 that warm up, float32, each side in a process of
its own. The time of 15 epochs is extrapolated: steps times the median, what compiling takes, and for the tap cache its
building, which is measured whole. LoRA has rank 24 on queries and values and AdamW; the loss is on the answers in both.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from configs import default
from experiments.benchmarks.pytorch import THREADS, export, peak_bytes, run_child, use_threads
from experiments.hardware import hardware
from experiments.sciq_rows import MAX_LENGTH, read_sciq
from spa_jax import command
from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import Batch, collate, padded_shape, plan_batches
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.training.config import RunConfig, parse
from spa_jax.training.rows import make_encoder
from spa_jax.weights.registry import load_backbone

DATA = flags.DEFINE_string("data", None, "Directory with SciQ's train.jsonl.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/against_lora.json", "Where to write the result.")
SIDE = flags.DEFINE_enum("side", None, ["pytorch", "uncached", "cached"], "Runs one side; for this command's own use.")
FOLDER = flags.DEFINE_string("folder", "runs/against_lora", "Of the sides' files; a side that is done is kept.")

EPOCHS, STEPS, WARM_UP = 15, 30, 3


def config_of() -> RunConfig:
    """The default run."""
    config = default.get_config()
    config.data.max_length = MAX_LENGTH
    return parse(config.to_dict())


def examples_of(config: RunConfig) -> tuple[Any, list[Example]]:
    """The backbone and SciQ's training rows."""
    backbone = load_backbone(config.backbone)
    pairs = read_sciq(Path(str(DATA.value)) / "train.jsonl")
    return backbone, make_encoder(backbone, config.data).encode_all(pairs)[0]


def chosen_rows(examples: Sequence[Example], batch_size: int) -> list[np.ndarray]:
    """Rows of the steps that are timed, the warm-up's first."""
    steps = plan_batches(examples, batch_size, seed=0)
    return [steps[step] for step in range(WARM_UP + STEPS)]


def time_steps(batches: Sequence[Any], step: Callable[[Any], object]) -> dict[str, float]:
    """Median seconds of the steps after the warm-up, and the warm-up's."""
    times = []
    for batch in batches:
        began = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - began)
    return {"step_seconds": statistics.median(times[WARM_UP:]), "warm_up_seconds": sum(times[:WARM_UP])}


def measure_pytorch(folder: Path) -> dict[str, float]:
    """A LoRA step: forward, backward, AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=24, lora_alpha=48, target_modules=["q_proj", "v_proj"]))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    model.train()

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()

    loaded = np.load(folder / "batches.npz")
    batches = []
    for i in range(WARM_UP + STEPS):
        names = ("input_ids", "attention_mask", "labels")
        batches.append({name: torch.from_numpy(loaded[f"{name}{i}"]).long() for name in names})
    found = time_steps(batches, step)
    return {**found, "trainable": sum(p.numel() for p in trainable), "peak_bytes": peak_bytes()}


def labelled(batch: Batch) -> dict[str, np.ndarray]:
    """The batch as `transformers` takes it: one token longer, since a label stands at the token it predicts."""
    rows, length = batch.tokens.shape
    ids, labels = np.zeros((rows, length + 1), np.int32), np.full((rows, length + 1), -100, np.int32)
    ids[:, :-1] = batch.tokens
    for row in range(rows):
        for at, target, weight in zip(batch.predict[row], batch.targets[row], batch.weights[row]):
            if weight:
                ids[row, at + 1] = labels[row, at + 1] = target
    mask = np.arange(length + 1)[None, :] < batch.lengths[:, None] + 1
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}


def measure_spa_jax(folder: Path, cached: bool) -> dict[str, float]:
    """A plugin's step, of features from the tap cache or by a backbone pass each time."""
    import jax
    import jax.numpy as jnp

    from spa_jax.models.llama import Llama
    from spa_jax.models.plugin import count_params
    from spa_jax.training import loop
    from spa_jax.training.optimizer import optimizer
    from spa_jax.training.run import plugin_config, trainable_params
    from spa_jax.training.step import init_state, make_train_step
    from spa_jax.training.tap_cache import FeatureSpec, TapCache

    config = config_of()
    backbone, examples = examples_of(config)
    plugin = plugin_config(config, backbone)
    model, size = Llama(backbone.config, plugin.side.taps, jnp.float32), config.train.batch_size
    tx = optimizer(config.optimizer, 1000)
    params = trainable_params(config, plugin, backbone)
    state = init_state(params, tx)
    train_step = make_train_step(plugin, config.router, model, tx, 1)
    source, built = collate, 0.0
    if cached:
        spec = FeatureSpec(backbone.fingerprint, plugin.side.taps, plugin.hidden_size, config.dtype)
        cache = TapCache(folder / "taps", spec)
        began = time.perf_counter()
        loop.fill_cache(cache, model, backbone.params, size, examples)
        built = time.perf_counter() - began
        source = cache.collate  # type: ignore[assignment]
    chosen = chosen_rows(examples, size)
    compiling = time.perf_counter()
    for rows in {padded_shape(examples[rows[0]]): rows for rows in chosen}.values():
        state, _ = train_step(state, backbone.params, source(examples, rows))
    compiled = time.perf_counter() - compiling

    def step(rows: np.ndarray) -> None:
        nonlocal state
        state, sums = train_step(state, backbone.params, source(examples, rows))
        jax.block_until_ready(sums)

    found = time_steps(chosen, step)
    once = {"build_seconds": built, "compile_seconds": compiled}
    return {**found, **once, "trainable": count_params(params), "peak_bytes": peak_bytes()}


def main() -> None:
    if DATA.value is None:
        raise UserError("name SciQ's directory with --data=DIR")
    if SIDE.value:
        use_threads()
        folder = Path(FOLDER.value)
        found = measure_pytorch(folder) if SIDE.value == "pytorch" else measure_spa_jax(folder, SIDE.value == "cached")
        write_json(folder / f"{SIDE.value}.json", found)
        return
    backbone, examples = examples_of(config_of())
    steps = len(plan_batches(examples, 8)) * EPOCHS
    folder = Path(FOLDER.value)
    if not (folder / "batches.npz").exists():
        export(backbone, folder / "model")
        arrays = {
            f"{key}{i}": array
            for i, rows in enumerate(chosen_rows(examples, 8))
            for key, array in labelled(collate(examples, rows)).items()
        }
        np.savez(folder / "batches.npz", **arrays)  # type: ignore[arg-type]
    sides = {}
    for side in ("pytorch", "uncached", "cached"):
        done = folder / f"{side}.json"
        if done.exists():
            sides[side] = json.loads(done.read_text(encoding="utf-8"))
        else:
            sides[side] = run_child("experiments.benchmarks.against_lora", side, folder, f"--data={DATA.value}")
    table = Table("", "trainable", "step s", "15 epochs s (extrapolated)", "peak GB")
    for side, found in sides.items():
        once = found.get("build_seconds", 0.0) + found.get("compile_seconds", 0.0)
        found["epochs_seconds_extrapolated"] = once + steps * found["step_seconds"]
        table.add_row(
            side, f"{found['trainable']:,}", f"{found['step_seconds']:.3f}",
            f"{found['epochs_seconds_extrapolated']:,.0f}", f"{found['peak_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    theirs = sides["pytorch"]
    ratios = {
        "step_without_cache": theirs["step_seconds"] / sides["uncached"]["step_seconds"],
        "15_epochs_with_cache": theirs["epochs_seconds_extrapolated"] / sides["cached"]["epochs_seconds_extrapolated"],
    }
    Console().print(table, f"times faster: {ratios}")
    result = {
        "command": "python -m experiments.benchmarks.against_lora --data=DIR",
        "hardware": f"{hardware()}, {THREADS} threads",
        "steps_of_15_epochs": steps,
        "sides": sides,
        "times_faster": ratios,
    }
    write_json(Path(OUTPUT.value), result)


if __name__ == "__main__":
    command.run(main)
