"""The flags of the commands of tables and figures, and how a table is written as JSON, Markdown and a plot."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table as ConsoleTable

from experiments.paper.scales import SCALES, find_scale
from experiments.paper.store import CellStore
from spa_jax import command
from spa_jax.files import write_bytes, write_json

matplotlib.use("agg")
from matplotlib import pyplot as plt

SCALE = flags.DEFINE_enum("scale", "mini", list(SCALES), "paper: as the paper; mini: what two processor cores can do.")
DATA = flags.DEFINE_string("data", "", "Directory with a directory of JSON lines for each task; the hub by default.")
WORKDIR = flags.DEFINE_string("workdir", "runs/paper", "Where runs and evaluations under way are kept.")
RESULTS = flags.DEFINE_string("results", "experiments/results", "Where finished cells and tables go.")
RUN = flags.DEFINE_bool("run", True, "Do what is not done yet; with --norun, tables are of what is there.")

ABSENT = "-"


class TableEntry(NamedTuple):
    """A number of ours with its interval, where there is one, and the paper's."""

    ours: float | None
    interval: tuple[float, float] | None = None
    paper: float | None = None

    def text(self, digits: int = 2) -> str:
        """Formats as `ours [low, high] (paper)`."""
        if self.ours is None:
            ours = ABSENT
        else:
            ours = f"{self.ours:.{digits}f}"
            if self.interval is not None:
                ours += " [{:.{d}f}, {:.{d}f}]".format(*self.interval, d=digits)
        return ours if self.paper is None else f"{ours} ({self.paper:g})"


Rows = dict[str, dict[str, TableEntry]]
"""Name of a row -> name of a column -> entry."""


def open_store() -> CellStore:
    """Opens the store that the flags name."""
    return CellStore(find_scale(SCALE.value), DATA.value, Path(WORKDIR.value), Path(RESULTS.value), RUN.value)


def entry(result: Mapping[str, Any] | None, metric: str, paper: float | None = None, factor: float = 1.0) -> TableEntry:
    """Makes the entry of a metric: `[mean, low, high]`, a number that is multiplied by a factor, or none."""
    found = None if result is None else result.get(metric)
    if isinstance(found, list):
        mean, low, high = found
        return TableEntry(mean, (low, high), paper)
    return TableEntry(None if found is None else factor * found, paper=paper)


def mean(entries: Sequence[TableEntry], paper: float | None = None) -> TableEntry:
    """Averages entries, once all of them are there."""
    found = [each.ours for each in entries if each.ours is not None]
    whole = bool(entries) and len(found) == len(entries)
    return TableEntry(sum(found) / len(found) if whole else None, paper=paper)


def write(
    store: CellStore, name: str, module: str, title: str, rows: Rows, notes: Sequence[str] = (),
    digits: Mapping[str, int] | None = None, folder: str = "", caption: str | None = None,
) -> None:  # fmt: skip
    """Prints the table and writes `NAME.json` and `NAME.md` into the results of the scale.

    Args:
        store: has the scale.
        name: of the files.
        module: what makes the table, after `python -m experiments.paper.`.
        title: of the table.
        rows: what it shows.
        notes: what is said below it.
        digits: decimal places of columns that do not have two.
        folder: where the labels of its cells begin with a folder, that with its slash; the machine is looked up there.
        caption: in place of the scale's.
    """
    digits = digits or {}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table, hardware = ConsoleTable(title, *columns), store.hardware(folder)
    said = f"python -m experiments.paper.{module} --scale={store.scale.name}"
    lines = [f"# {title}", "", f"`{said}`; {hardware}.", ""]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label, row in rows.items():
        cells = [row[column].text(digits.get(column, 2)) if column in row else "" for column in columns]
        table.add_row(label, *cells)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if any(entry.interval or entry.paper for row in rows.values() for entry in row.values()):
        lines += ["", "In brackets the 95 % bootstrap interval, in parentheses the paper's number."]
    for note in (caption or f"Scale: {store.scale.caption}", *notes):
        lines += ["", note]
    Console(width=200).print(table)
    record = {
        "command": said,
        "hardware": hardware,
        "rows": {label: {column: entry._asdict() for column, entry in row.items()} for label, row in rows.items()},
        "notes": [caption or store.scale.caption, *notes],
    }
    write_json(store.results / f"{name}.json", record)
    write_bytes(store.results / f"{name}.md", ("\n".join(lines) + "\n").encode())


def plot_bars(path: Path, title: str, rows: Rows) -> None:
    """Draws a group of bars for each column, a bar for each row; the paper's numbers as marks."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    figure, axes = plt.subplots(figsize=(1.5 + 2.2 * len(columns), 3.6), layout="constrained")
    width = 0.8 / len(rows)
    for i, (label, row) in enumerate(rows.items()):
        found = [(j, row[column]) for j, column in enumerate(columns) if column in row]
        ours = [(j + (i + 0.5) * width - 0.4, entry) for j, entry in found if entry.ours is not None]
        heights = [float(entry.ours or 0) for _, entry in ours]
        errors = np.array([_error(entry) for _, entry in ours]).reshape(-1, 2).T
        axes.bar([x for x, _ in ours], heights, width, yerr=errors if errors.any() else None, label=label)
        paper = [(j + (i + 0.5) * width - 0.4, entry.paper) for j, entry in found if entry.paper is not None]
        axes.plot([x for x, _ in paper], [y for _, y in paper], "k_", markersize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_title(f"{title} (marks: the paper)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _error(entry: TableEntry) -> tuple[float, float]:
    if entry.interval is None or entry.ours is None or not np.isfinite(entry.interval).all():
        return 0.0, 0.0
    return max(entry.ours - entry.interval[0], 0.0), max(entry.interval[1] - entry.ours, 0.0)


def run_report(report: Callable[[CellStore], None]) -> None:
    """Runs a module's `report(store)` as a command."""
    command.run(lambda: report(open_store()))
