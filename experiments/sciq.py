"""What the choices of training are worth on SciQ: settings, router objectives, margins, kinds, taps and widths.

    python -m experiments.sciq --data=DIR --workdir=runs/sciq --output=experiments/results/sciq.json [--only=TEXT]

DIR holds train.jsonl, validation.jsonl and test.jsonl with SciQ's columns (`allenai/sciq`). Plugins are chosen on
validation and measured on test: nats per answer token, teacher-forced, and the share of tokens the device is asked for.
A row that is done is skipped, so a killed run goes on where it stopped.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments.ablation import run_rows, write_splits
from experiments.sciq_rows import MAX_LENGTH, read_sciq
from spa_jax import command

DATA = flags.DEFINE_string("data", None, "Directory with SciQ's train.jsonl, validation.jsonl and test.jsonl.")
WORKDIR = flags.DEFINE_string("workdir", "runs/sciq", "Where runs and finished rows are kept.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/sciq.json", "Where to write the table.")
ONLY = flags.DEFINE_string("only", "", "Run only rows whose name holds this text.")

FIXED = {"data.max_length": MAX_LENGTH, "train.epochs": 8, "train.log_every": 100}
SEEDS = 3


def rows() -> dict[str, dict[str, Any]]:
    """Name of each row -> the keys it sets."""
    table: dict[str, dict[str, Any]] = {}
    ours = {"router.offset": True, "router.cross_fit": True, "router.margin": 0.25}
    for seed in range(SEEDS):
        table[f"s1 seed {seed}"] = {"setting": "s1", "seed": seed}
        table[f"spa seed {seed}"] = {"seed": seed}
        table[f"spa offset seed {seed}"] = {"router.offset": True, "seed": seed}
        table[f"spa offset cross-fitted seed {seed}"] = {**ours, "seed": seed}
    table["s2 margin 0.0"] = {"setting": "s2", "router.margin": 0.0}
    table["s3"] = {"setting": "s3"}
    for margin in (0.0, 0.25, 1.0):
        table[f"spa margin {margin}"] = {"router.margin": margin}
    table["spa unweighted margin 0.0"] = {"router.weighted": False, "router.margin": 0.0}
    table["spa unweighted"] = {"router.weighted": False}
    table["spa cross-fitted"] = {"router.cross_fit": True}
    table["spa soft"] = {"router.objective": "soft"}
    table["spa straight-through"] = {"router.objective": "straight_through"}
    table["spa offset margin 0.0"] = {"router.offset": True, "router.margin": 0.0}
    for width in (16, 64):
        table[f"spa E {width}"] = {"side.width": width}
    for taps in ("all", "every:3", "last:4", "last:2", "last:1"):
        table[f"spa taps {taps}"] = {"side.taps": taps, "side.width": 0}
    transformer = {"side.kind": "transformer", "side.width": 0, "side.heads": 2}
    for init in ("random", "pruned"):
        for setting in ("spa", "s3"):
            table[f"{setting} transformer {init}"] = {"setting": setting, "side.init": init, **transformer}
    return table


def main() -> None:
    workdir = Path(WORKDIR.value)
    write_splits("SciQ", DATA.value, read_sciq, workdir)
    run_rows(rows(), FIXED, workdir, Path(OUTPUT.value), ONLY.value, "python -m experiments.sciq --data=DIR")


if __name__ == "__main__":
    command.run(main)
