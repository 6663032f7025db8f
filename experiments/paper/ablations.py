"""Ablations, which the paper does not have: settings, router objectives, margins, kinds, taps and widths on SciQ, and
the rows that decide on CoQA.

All are trained at one learning rate on single questions (`experiments.paper.single_questions`), chosen on validation,
and measured on test, teacher-forced: nats per answer token, and the share of tokens that the device is asked for.
"""

from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from experiments.paper.cells import TRANSFORMER, Cell, Training
from experiments.paper.scales import Scale

FOLDER = "ablations/"
SEEDS = 3
CROSS_FITTED = {"router.offset": True, "router.cross_fit": True, "router.margin": 0.25}


def _sciq() -> dict[str, dict[str, Any]]:
    """Names the rows, with what each changes of the config."""
    table: dict[str, dict[str, Any]] = {}
    for seed in range(SEEDS):
        table[f"s1 seed {seed}"] = {"setting": "s1", "seed": seed}
        table[f"spa seed {seed}"] = {"seed": seed}
        table[f"spa offset seed {seed}"] = {"router.offset": True, "seed": seed}
        table[f"spa offset cross-fitted seed {seed}"] = {**CROSS_FITTED, "seed": seed}
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
        table[f"spa taps {taps}"] = {"side.taps": taps}
    for init in ("random", "pruned"):
        for setting in ("spa", "s3"):
            table[f"{setting} transformer {init}"] = {"setting": setting, **TRANSFORMER, "side.init": init}
    return table


def _coqa() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for seed in range(SEEDS):
        table[f"s1 seed {seed}"] = {"setting": "s1", "seed": seed}
        table[f"spa seed {seed}"] = {"seed": seed}
        table[f"spa offset seed {seed}"] = {"router.offset": True, "seed": seed}
    table["spa offset cross-fitted"] = CROSS_FITTED
    table["s3"] = {"setting": "s3"}
    return table


ROWS = {"sciq": _sciq(), "coqa": _coqa()}
SAME_SIZE = ("side.taps", "side.kind")
"""Changes after which the width is chosen anew, for as many parameters as without them."""


def training(scale: Scale, task: str, row: str) -> Training:
    """Trains the row of a task's ablation table."""
    changes = {"seed": 0, **scale.ablations[task], **ROWS[task][row]}
    same_size = any(key in changes for key in SAME_SIZE)
    label = f"{FOLDER}{task}-{row.replace(' ', '-').replace(':', '-')}"
    return Training(label, task, FrozenDict(changes), same_size=same_size, single_questions=True)


def cells(scale: Scale, task: str) -> Mapping[str, Cell]:
    """Returns the cell of each row of a task's ablation table; none at a scale that has none."""
    if task not in scale.ablations:
        return {}
    trainings = {row: training(scale, task, row) for row in ROWS[task]}
    return {row: Cell(found.label, task, found, generates=False) for row, found in trainings.items()}
