"""Training a plugin against training LoRA with PEFT in PyTorch: the same backbone, rows, lengths and threads.

    python -m experiments.benchmarks.against_lora --data=DIR

DIR has SciQ's train.jsonl. Medians of 30 steps of 8 rows after 3 that warm up, float32, each side in a process of
its own. The time of 15 epochs is extrapolated: steps times the median, what compiling takes, and for the tap cache its
building, which is measured whole. LoRA has rank 24 on queries and values and AdamW; the loss is on the answers in both.
The plugins are those of PLUGINS, each with a tap cache and without.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks.output import write_result
from experiments.benchmarks.pytorch import export, peak_bytes, run_child
from experiments.benchmarks.timing import THREADS, use_threads
from experiments.record import print_table
from spa_jax import command
from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import Batch, collate, padded_shapes, plan_batches
from spa_jax.data.tasks import load_split
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.training.config import RunConfig, with_defaults
from spa_jax.training.rows import make_encoder
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

DATA = flags.DEFINE_string("data", None, "Directory with SciQ's train.jsonl.")
SIDE = flags.DEFINE_string("side", None, "Runs one side; for this command's own use.")
FOLDER = flags.DEFINE_string("folder", "runs/against_lora", "Directory of the sides' files; a finished side is kept.")

EPOCHS, STEPS, WARM_UP = 15, 30, 3
CONFIG = {"data.max_length": 320}
PLUGINS: dict[str, dict[str, str]] = {
    "head": {"side.entry": "head"},
    "targets": {"side.entry": "18", "side.edits": "targets"},
    "all": {"side.entry": "18", "side.edits": "all"},
}
"""Where corrections enter, and at which positions, by the name of a side."""
SIDES = ["pytorch", *(f"{plugin} {how}" for plugin in PLUGINS for how in ("without cache", "cached"))]


def load_examples(config: RunConfig) -> tuple[Backbone, list[Example]]:
    """Loads the backbone and SciQ's training rows."""
    backbone = load_backbone(config.backbone)
    pairs = load_split("sciq", str(DATA.value), "train")
    return backbone, make_encoder(backbone, config.data).encode_all(pairs)[0]


def chosen_rows(examples: Sequence[Example], batch_size: int) -> list[np.ndarray]:
    """Returns the rows of the steps that are timed, after those of the warm-up."""
    steps = plan_batches(examples, batch_size, seed=0)
    return [steps[step] for step in range(WARM_UP + STEPS)]


def time_steps(batches: Sequence[Any], step: Callable[[Any], object]) -> dict[str, float]:
    """Returns the median seconds of the steps after the warm-up, and the warm-up's."""
    times = []
    for batch in batches:
        began = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - began)
    return {"step_seconds": statistics.median(times[WARM_UP:]), "warm_up_seconds": sum(times[:WARM_UP])}


def measure_pytorch(folder: Path) -> dict[str, float]:
    """Times a LoRA step: forward, backward, AdamW."""
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
    """Returns the batch as `transformers` takes it: one token longer, since a label stands at the token it predicts."""
    rows, length = batch.tokens.shape
    ids, labels = np.zeros((rows, length + 1), np.int32), np.full((rows, length + 1), -100, np.int32)
    ids[:, :-1] = batch.tokens
    for row in range(rows):
        for at, target, weight in zip(batch.predict[row], batch.targets[row], batch.weights[row]):
            if weight:
                ids[row, at + 1] = labels[row, at + 1] = target
    mask = np.arange(length + 1)[None, :] < batch.lengths[:, None] + 1
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}


def measure_spa_jax(folder: Path, plugin: str, cached: bool) -> dict[str, float]:
    """Times a step of one of PLUGINS, on features from the tap cache or by a backbone pass each time."""
    import jax

    from spa_jax.models.plugin import count_params
    from spa_jax.training.methods import recipe_from_config
    from spa_jax.training.optimizer import make_optimizer
    from spa_jax.training.step import init_state, train_step

    config = with_defaults(
        {**CONFIG, **PLUGINS[plugin], "tap_cache.enabled": cached, "tap_cache.directory": str(folder / "taps")},
    )
    backbone, examples = load_examples(config)
    recipe, size = recipe_from_config(config, backbone.config), config.train.batch_size
    model, optimizer = recipe.model(backbone), make_optimizer(config.optimizer, 1000)
    state = init_state(recipe.init_params(backbone), optimizer)
    source, _ = recipe.sources(backbone, model, config.tap_cache, size, examples)
    began = time.perf_counter()
    source.fill(examples)
    built = time.perf_counter() - began

    shapes = padded_shapes(examples, size)

    def step(rows: np.ndarray) -> None:
        nonlocal state
        batch = source.collate(examples, rows, shapes[rows[0]])
        state, sums = train_step(recipe, model, optimizer, 1, state, backbone.params, batch)
        jax.block_until_ready(sums)

    chosen = chosen_rows(examples, size)
    began = time.perf_counter()
    for rows in {shapes[rows[0]]: rows for rows in chosen}.values():
        step(rows)
    once = {"build_seconds": built, "compile_seconds": time.perf_counter() - began}
    found = time_steps(chosen, step)
    return {**found, **once, "trainable": count_params(state.params), "peak_bytes": peak_bytes()}


def main() -> None:
    if DATA.value is None:
        raise UserError("name SciQ's directory with --data=DIR")
    if SIDE.value:
        use_threads()
        folder = Path(FOLDER.value)
        plugin, _, how = SIDE.value.partition(" ")
        found = measure_pytorch(folder) if plugin == "pytorch" else measure_spa_jax(folder, plugin, how == "cached")
        write_json(folder / f"{SIDE.value}.json", found)
        return
    backbone, examples = load_examples(with_defaults(CONFIG))
    steps = len(plan_batches(examples, 8)) * EPOCHS
    folder = Path(FOLDER.value)
    if not (folder / "batches.npz").exists():
        export(backbone, folder / "model")
        shapes = padded_shapes(examples, 8)
        arrays = {
            f"{key}{i}": array
            for i, rows in enumerate(chosen_rows(examples, 8))
            for key, array in labelled(collate(examples, rows, shapes[rows[0]])).items()
        }
        np.savez(folder / "batches.npz", **arrays)  # type: ignore[arg-type]
    sides = {}
    for side in SIDES:
        done = folder / f"{side}.json"
        if done.exists():
            sides[side] = json.loads(done.read_text(encoding="utf-8"))
        else:
            sides[side] = run_child("experiments.benchmarks.against_lora", side, folder, f"--data={DATA.value}")
    cells = []
    for side, found in sides.items():
        once = found.get("build_seconds", 0.0) + found.get("compile_seconds", 0.0)
        whole = found["epochs_seconds_extrapolated"] = once + steps * found["step_seconds"]
        memory = f"{found['peak_bytes'] / 1e9:.2f}"
        cells.append((side, f"{found['trainable']:,}", f"{found['step_seconds']:.3f}", f"{whole:,.0f}", memory))
    print_table(("", "trainable", "step s", "15 epochs s (extrapolated)", "peak GB"), cells)
    theirs = sides["pytorch"]
    ratios = {
        side: {
            "step": theirs["step_seconds"] / ours["step_seconds"],
            "15_epochs": theirs["epochs_seconds_extrapolated"] / ours["epochs_seconds_extrapolated"],
            "memory": theirs["peak_bytes"] / ours["peak_bytes"],
        }
        for side, ours in sides.items()
        if side != "pytorch"
    }
    for side, times in ratios.items():
        print(
            f"{side}: PyTorch takes {times['step']:.1f} times the step and {times['15_epochs']:.1f} times the 15 epochs"
        )
    result = {"steps_of_15_epochs": steps, "sides": sides, "times_faster": ratios}
    write_result("against_lora", result, "--data=DIR", threads=THREADS)


if __name__ == "__main__":
    command.run(main)
