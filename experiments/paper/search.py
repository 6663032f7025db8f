"""The search for the best plugin, by successive halving (Jamieson & Talwalkar 2016) on validation losses.

    python -m experiments.paper.search --scale=mini --data=DIR

Every candidate changes something of BASE. A stage trains all candidates that are left on its tasks, ranks them by the
mean over tasks of the share of the base's loss that is left when the device is always asked, and passes the best ones
on. The state with the least validation loss counts, so a long training that overfits loses nothing but time. No test
row is read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import flags
from flax.core import FrozenDict

from experiments.paper import report as reporting
from experiments.paper.cells import Training
from experiments.paper.report import Rows, TableEntry, run_report, write
from experiments.paper.scales import TITLES, Scale
from experiments.paper.store import CellStore

flags.adopt_module_key_flags(reporting)  # --help shows them

FOLDER = "search/"
BASE: Mapping[str, Any] = FrozenDict(
    {
        "setting": "spa",
        "side.entry": "14",
        "side.edits": "all",
        "side.taps": "every:6",
        "router.labels": "always",
        "dtype": "bfloat16",
    }
)
CANDIDATES: dict[str, dict[str, Any]] = {
    "head": {"side.entry": "head", "side.edits": "targets", "dtype": "float32"},
    "entry 8, targets": {"side.entry": "8", "side.edits": "targets", "dtype": "float32"},
    "entry 14, targets": {"side.edits": "targets", "dtype": "float32"},
    "entry 18, targets": {"side.entry": "18", "side.edits": "targets", "dtype": "float32"},
    "entry 22, targets": {"side.entry": "22", "side.edits": "targets", "dtype": "float32"},
    "entry 14": {},
    "rate 2e-3": {"optimizer.learning_rate": 2e-3},
    "rate 4e-3": {"optimizer.learning_rate": 4e-3},
    "rate 5e-4": {"optimizer.learning_rate": 5e-4},
    "entry 18": {"side.entry": "18"},
    "width 64": {"side.width": 64},
}
"""Name -> what it changes of BASE."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the search.

    Attributes:
        tasks: that candidates are trained on.
        size: of the training data, by its name in Table 5.
        epochs: of each training.
        keep: candidates that go on.
    """

    tasks: tuple[str, ...]
    size: str
    epochs: int
    keep: int


STAGES = (
    Stage(("sciq",), "medium", 6, 2),
    Stage(("sciq", "xsum", "coqa"), "medium", 6, 1),
)
"""Eleven trainings, then four more: those of SciQ are there."""


def candidate(scale: Scale, task: str, name: str, stage: Stage) -> Training:
    """Describes the training of a candidate on a task of a stage."""
    size = scale.sizes[task][stage.size]
    changes = {**BASE, **CANDIDATES[name], "data.size": size, **scale.short[task]}
    words = "-".join(name.replace(",", "").replace(":", " ").split())
    label = f"{FOLDER}{task}-{stage.size}-{stage.epochs}epochs-{words}"
    return Training(label, task, FrozenDict({**changes, "train.epochs": stage.epochs}))


def trainings(scale: Scale) -> list[Training]:
    """Returns all that the search may train, whichever candidates go on; two stages may have the same one."""
    every = (candidate(scale, task, name, stage) for stage in STAGES for task in stage.tasks for name in CANDIDATES)
    return list(dict.fromkeys(every))


def share_left(store: CellStore, name: str, stage: Stage) -> dict[str, TableEntry]:
    """Returns what a stage shows of a candidate: the validation losses in nats, and the mean share of the base's that
    is left."""
    columns, shares = {}, []
    for task in stage.tasks:
        summary = store.summary(candidate(store.scale, task, name, stage)) or {}
        always, base = summary.get("loss/always"), summary.get("loss/base")
        columns[f"{TITLES[task]} base"] = TableEntry(base)
        columns[f"{TITLES[task]} always asked"] = TableEntry(always)
        columns[f"{TITLES[task]} by the router"] = TableEntry(summary.get("loss/spa"))
        columns[f"{TITLES[task]} share asked"] = TableEntry(summary.get("router/usage"))
        if always is not None and base is not None:
            shares.append(always / base)
    whole = len(shares) == len(stage.tasks)
    return {"mean share left": TableEntry(sum(shares) / len(shares) if whole else None), **columns}


def report(store: CellStore) -> None:
    """Runs the search as far as it has not run, and writes a table of each stage."""
    names = list(CANDIDATES)
    for number, stage in enumerate(STAGES, start=1):
        rows: Rows = {name: share_left(store, name, stage) for name in names}
        losses = {name: row["mean share left"].ours for name, row in rows.items()}
        done = {name: loss for name, loss in losses.items() if loss is not None}
        if not done:
            return
        ranked = sorted(done, key=lambda name: done[name])
        title = f"Search, stage {number}: {', '.join(TITLES[task] for task in stage.tasks)}, {stage.epochs} epochs"
        note = f"Validation losses in nats per target token. The best {stage.keep} go on."
        rows = {name: rows[name] for name in [*ranked, *(name for name in names if name not in done)]}
        digits = {column: 3 for row in rows.values() for column in row}
        write(store, f"search_{number}", "search", title, rows, [note], digits, FOLDER)
        if len(done) < len(names):
            return
        names = ranked[: stage.keep]


if __name__ == "__main__":
    run_report(report)
