"""Every table and figure of one scale: python -m experiments.paper.run --all --scale=mini --data=DIR

Says first how long what is not done yet will take, by what finished cells took; does it cell by cell, so that a killed
run goes on where it stopped; then writes the tables, and says how many backbone passes the tap cache has saved.
`--only=PATTERN` does the cells in whose label a regular expression is found, and writes the tables of what is there.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from rich.console import Console

from experiments.paper import claims, router_curve, table2, tables
from experiments.paper import report as reporting
from experiments.paper.cells import Cell, Training
from experiments.paper.report import open_store
from experiments.paper.scales import TITLES, Scale
from experiments.paper.store import CellStore
from experiments.record import write_record
from spa_jax import command
from spa_jax.errors import UserError
from spa_jax.models.peft import PEFT_SETTINGS

flags.adopt_module_key_flags(reporting)  # --help shows them

ALL = flags.DEFINE_bool("all", False, "Run everything.")
ONLY = flags.DEFINE_string("only", "", "Run only cells in whose label this regular expression is found.")

MODULES: tuple[ModuleType, ...] = (tables, router_curve, table2)
"""Each has `cells(scale)` and `report(store)`; claims are about the same cells."""


def all_cells(scale: Scale) -> list[Cell]:
    """Returns the cells of all modules, each once, those of a task together: they share its prompts."""
    cells = dict.fromkeys(cell for module in MODULES for cell in module.cells(scale))
    return sorted(cells, key=lambda cell: list(TITLES).index(cell.task))


def select(cells: list[Cell], only: str) -> list[Cell]:
    """Returns those in whose label the regular expression is found; all by an empty one.

    Raises:
        UserError: it is none.
    """
    try:
        return [cell for cell in cells if re.search(only, cell.label)]
    except re.error as error:
        raise UserError(f"--only='{only}' is no regular expression: {error}") from error


def estimate(store: CellStore, todo: list[Cell]) -> float | None:
    """Returns the seconds that the cells will take, by the mean of what was measured of the same kind, or else of all;
    None where nothing was measured."""
    trainings = _measured(store.results / "trainings", "time/train_seconds", _training_kind)
    evaluations = _measured(store.results / "cells", "time/evaluate_seconds", _cell_kind)
    if not trainings or not evaluations:
        return None
    missing: dict[str, Training] = {}
    for cell in todo:
        missing |= store.missing_runs(cell.training) if cell.training else {}
    seconds = sum(_mean(evaluations, _cell_kind(cell.description)) for cell in todo)
    return seconds + sum(_mean(trainings, _training_kind(training.description)) for training in missing.values())


def _training_kind(description: Mapping[str, Any]) -> tuple:
    return description["task"], description["single_questions"], description["changes"].get("data.size")


def _cell_kind(description: Mapping[str, Any]) -> tuple:
    return description["task"], description["generates"]


def _measured(folder: Path, key: str, kind: Callable[[Mapping[str, Any]], tuple]) -> list[tuple[tuple, float]]:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*.json")]
    described = [record for record in records if "description" in record]
    return [(kind(record["description"]), record[key]) for record in described if key in record]


def _mean(measured: list[tuple[tuple, float]], kind: tuple) -> float:
    like = [value for of, value in measured if of == kind] or [value for _, value in measured]
    return sum(like) / len(like)


def backbone_passes(store: CellStore) -> dict[str, Any]:
    """Counts, example by example, how often the trainings needed the backbone and how often it ran; not of those that
    train through it, nor of the ablations."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (store.results / "trainings").glob("*.json")]
    needed = run = 0
    for record in {record["run"]: record for record in records}.values():  # the best of those tried has two records
        if record["description"]["changes"]["setting"] not in PEFT_SETTINGS:
            epochs = record["epochs"]
            needed += epochs * record["data/train_examples"] + (epochs + 2) * record["data/held_out_examples"]
            run += record["data/backbone_passes"]
    return {"needed": needed, "run": run, "saved": needed - run}


def main() -> None:
    if not (ALL.value or ONLY.value):
        raise UserError("give --all for every cell, or --only=PATTERN for those in whose label it is found")
    store, console = open_store(), Console()
    todo = [cell for cell in select(all_cells(store.scale), ONLY.value) if not store.done(cell)]
    seconds = estimate(store, todo)
    about = "no cell is done yet to judge by" if seconds is None else f"about {seconds / 60:.0f} minutes here"
    console.print(f"{len(todo)} cells to run: {about}")
    for cell in todo:
        store.result(cell)
    store.may_run = ALL.value
    for module in (*MODULES, claims):
        module.report(store)
    passes = backbone_passes(store)
    console.print(
        f"the trainings needed {passes['needed']:,} backbone passes over an example, of which the tap cache left "
        f"{passes['run']:,}"
    )
    write_record(store.results / "backbone_passes.json", f"paper.run --all --scale={store.scale.name}", passes)


if __name__ == "__main__":
    command.run(main)
