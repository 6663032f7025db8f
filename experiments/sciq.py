"""What the choices of training are worth on SciQ: settings, router objectives, margins, kinds, taps and widths.

    python -m experiments.sciq --data=DIR --workdir=runs/sciq --output=experiments/results/sciq.json [--only=TEXT]

DIR holds train.jsonl, validation.jsonl and test.jsonl with SciQ's columns (`allenai/sciq`). Plugins are chosen on
validation and measured on test: nats per answer token, teacher-forced, and the share of tokens the device is asked for.
A row that is done is skipped, so a killed run goes on where it stopped.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from configs import default
from spa_jax import command
from spa_jax.data.tasks import read_json_lines
from spa_jax.errors import UserError
from spa_jax.files import write_bytes, write_json
from spa_jax.models.llama import Llama
from spa_jax.training import loop
from spa_jax.training.config import RunConfig, parse
from spa_jax.training.evaluation import Evaluator, threshold_for
from spa_jax.training.run import make_encoder, open_tap_cache, train
from spa_jax.training.step import make_eval_step
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import load_backbone

DATA = flags.DEFINE_string("data", None, "Directory with SciQ's train.jsonl, validation.jsonl and test.jsonl.")
WORKDIR = flags.DEFINE_string("workdir", "runs/sciq", "Where runs and finished rows are kept.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/sciq.json", "Where to write the table.")
ONLY = flags.DEFINE_string("only", "", "Run only rows whose name holds this text.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of the rows that decide: spa, s1, s2, s3.")

MATCHED = {"transformer": 44}
"""E of the transformer kind with as many parameters as the token-wise one at E = 32, six taps (within 10 %)."""


def rows() -> dict[str, dict[str, Any]]:
    """Name of each row -> the keys it sets."""
    table: dict[str, dict[str, Any]] = {}
    for seed in range(SEEDS.value):
        for setting in ("spa", "s1", "s2", "s3"):
            table[f"{setting} seed {seed}"] = {"setting": setting, "seed": seed}
    for margin in (0.25, 0.5, 1.0):
        table[f"spa margin {margin}"] = {"router.margin": margin}
    table["spa unweighted"] = {"router.weighted": False}
    table["spa cross-fitted"] = {"router.cross_fit": True}
    table["spa soft"] = {"router.objective": "soft"}
    table["spa straight-through"] = {"router.objective": "straight_through"}
    transformer = {"side.kind": "transformer", "side.width": MATCHED["transformer"], "side.heads": 2}
    for setting in ("spa", "s3"):
        table[f"{setting} transformer"] = {"setting": setting, **transformer}
    for taps in ("all", "every:3", "last:4"):
        table[f"spa taps {taps}"] = {"side.taps": taps}
    for width in (16, 64):
        table[f"spa E {width}"] = {"side.width": width}
    return table


def run_config(keys: dict[str, Any], data: Path) -> RunConfig:
    """The default config on SciQ with some keys set."""
    config = default.get_config()
    fixed = {"data.train": str(data / "train.jsonl"), "data.eval": str(data / "validation.jsonl")}
    config.update_from_flattened_dict(
        {**fixed, "data.max_length": 224, "optimizer.learning_rate": 3e-3, "train.log_every": 100, **keys}
    )
    return parse(config.to_dict())


def as_pairs(source: Path, target: Path) -> None:
    """Writes SciQ's rows as `{"source", "target"}`: the passage and the question, and the answer."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        lines.append(json.dumps({"source": f"{row['support']}\n{row['question']}", "target": row["correct_answer"]}))
    write_bytes(target, "\n".join(lines).encode())


def measure(config: RunConfig, workdir: Path, backbone: Backbone, test: Path) -> dict[str, float]:
    """Test metrics of a run's plugin at its own threshold and at a consulted share of 0.62."""
    plugin = load_plugin(workdir / "plugin")
    model = Llama(backbone.config, plugin.config.side.taps, jnp.dtype(config.dtype))
    examples, _ = make_encoder(backbone, config.data).encode_all(read_json_lines(str(test)))
    cache = open_tap_cache(config, plugin.config, backbone, examples)
    loop.fill_cache(cache, model, backbone.params, config.train.batch_size, examples)
    step = make_eval_step(plugin.config, model)
    evaluate = Evaluator(
        step, backbone.params, examples, cache.collate, config.train.batch_size, "plugin", plugin.config.threshold
    )
    outcomes = evaluate.outcomes(plugin.params)
    metrics = evaluate(plugin.params)
    if plugin.config.routed:
        sigma = np.asarray(outcomes.probability) > threshold_for(np.asarray(outcomes.probability), 0.62)
        metrics["loss/at 0.62"] = float(np.where(sigma, outcomes.always, outcomes.base).mean())
    return metrics


def main() -> None:
    if DATA.value is None:
        raise UserError("name SciQ's directory with --data=DIR")
    workdir = Path(WORKDIR.value)
    data = workdir / "data"
    for split in ("train", "validation", "test"):
        as_pairs(Path(DATA.value) / f"{split}.jsonl", data / f"{split}.jsonl")
    backbone = load_backbone(default.get_config().backbone)
    results = {}
    for name, keys in rows().items():
        done = workdir / "rows" / f"{name}.json"
        if not done.exists() and ONLY.value in name:
            config = run_config(keys, data)
            summary = train(config, workdir / name)
            metrics = measure(config, workdir / name, backbone, data / "test.jsonl")
            kept = {key: summary[key] for key in ("params/trainable", "time/train_seconds", "router/threshold")}
            write_json(done, {"keys": keys, **metrics, **kept})
        if done.exists():
            results[name] = json.loads(done.read_text(encoding="utf-8"))
    columns = ("loss/plugin", "router/usage", "loss/at 0.62", "loss/always", "loss/oracle", "loss/base")
    table = Table("row", *columns, "parameters")
    for name, row in results.items():
        table.add_row(name, *(f"{row[c]:.3f}" if c in row else "" for c in columns), f"{row['params/trainable']:,}")
    Console().print(table)
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), {jax.devices()[0].platform}"
    write_json(Path(OUTPUT.value), {"command": "python -m experiments.sciq", "hardware": hardware, "rows": results})


if __name__ == "__main__":
    command.run(main)
