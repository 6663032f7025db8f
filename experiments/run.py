"""Every table and figure of one scale: python -m experiments.run --all --scale=mini --data=DIR

Says first how long what is not done yet will take, by what finished cells took; does it cell by cell, so that a killed
run goes on where it stopped; then writes the tables, and says how many backbone passes the tap cache has saved.
`--only=PATTERN` does the cells in whose name a regular expression is found, and writes the tables of what is there.
"""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from rich.console import Console

from experiments import (
    claims,
    figure4,
    repetition,
    router_curve,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table7,
)
from experiments.ablation import hardware
from experiments.cells import Bench, Cell
from experiments.report import open_bench
from experiments.scales import LEARNING_RATES, TITLES
from spa_jax import command
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.models.peft import PEFT_SETTINGS

ALL = flags.DEFINE_bool("all", False, "Run everything.")
ONLY = flags.DEFINE_string("only", "", "Run only cells in whose name this regular expression is found.")

MODULES: tuple[ModuleType, ...] = (
    table6,
    table1,
    table3,
    table4,
    table5,
    table7,
    figure4,
    router_curve,
    table2,
    repetition,
    claims,
)
"""In the order in which their cells are run."""


def all_cells(bench: Bench) -> list[Cell]:
    """Of all modules, each once, those of a task together: they share its prompts."""
    return sorted(dict.fromkeys(cell for module in MODULES for cell in module.cells(bench.scale)), key=_task)


def select(cells: list[Cell], only: str) -> list[Cell]:
    """Those in whose name the regular expression is found; all by an empty one.

    Raises:
        UserError: it is none.
    """
    try:
        return [cell for cell in cells if re.search(only, cell.name)]
    except re.error as error:
        raise UserError(f"--only='{only}' is no regular expression: {error}") from error


def _task(cell: Cell) -> int:
    return list(TITLES).index(cell.task)


def estimate(bench: Bench, todo: list[Cell]) -> float | None:
    """Seconds that the cells will take: of each task the means of what was measured; None where nothing was."""
    trainings = _measured(bench.results / "trainings", "time/train_seconds")
    evaluations = _measured(bench.results / "cells", "time/evaluate_seconds")
    if not trainings or not evaluations:
        return None
    done = {path.stem for path in (bench.results / "trainings").glob("*.json")}
    names = {cell.training.name: cell.training for cell in todo if cell.training and cell.training.name not in done}
    seconds = sum(_mean(evaluations, cell.task) for cell in todo)
    for training in names.values():
        runs = 1 if training.size != "medium" else len(LEARNING_RATES)
        seconds += runs * _mean(trainings, f"{training.task}-{training.size}")
    return seconds


def _measured(folder: Path, key: str) -> dict[str, float]:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")).get(key) for path in folder.glob("*.json")}
    return {name: value for name, value in found.items() if value is not None}


def _mean(measured: dict[str, float], begins: str) -> float:
    like = [value for name, value in measured.items() if name.startswith(begins)] or list(measured.values())
    return sum(like) / len(like)


def backbone_passes(bench: Bench) -> dict[str, Any]:
    """Example by example: how often the trainings needed the backbone, and how often it ran."""
    needed = run = 0
    summaries = {}
    for path in (bench.results / "trainings").glob("*.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        rate = summary["learning_rate"]  # the best of those tried has two files
        summaries[path.stem.removesuffix(f"-{rate:g}"), rate] = summary
    for (name, _), summary in summaries.items():
        if not any(f"-{method}" in name for method in PEFT_SETTINGS):
            epochs = summary["epochs"]
            needed += epochs * summary["data/train_examples"] + (epochs + 2) * summary["data/held_out_examples"]
            run += summary["data/backbone_passes"]
    return {"needed": needed, "run": run, "saved": needed - run}


def main() -> None:
    if not (ALL.value or ONLY.value):
        raise UserError("give --all for every cell, or --only=PATTERN for those in whose name it is found")
    bench, console = open_bench(), Console()
    todo = [cell for cell in select(all_cells(bench), ONLY.value) if not bench.done(cell)]
    seconds = estimate(bench, todo)
    about = "no cell is done yet to judge by" if seconds is None else f"about {seconds / 60:.0f} minutes here"
    console.print(f"{len(todo)} cells to run: {about}")
    for cell in todo:
        bench.result(cell)
    bench.may_run = ALL.value
    for module in MODULES:
        module.report(bench)
    passes = backbone_passes(bench)
    console.print(
        f"the trainings needed {passes['needed']:,} backbone passes over an example, of which the tap cache left "
        f"{passes['run']:,}"
    )
    said = f"python -m experiments.run --all --scale={bench.scale.name}"
    write_json(bench.results / "backbone_passes.json", {"command": said, "hardware": hardware(), **passes})


if __name__ == "__main__":
    command.run(main)
