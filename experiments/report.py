"""What the modules of tables and figures share: flags, and how a table is written as JSON, Markdown and a plot."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.cells import Bench, Cell
from experiments.scales import SCALES, TASKS, TITLES, Scale, find_scale
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


class Entry(NamedTuple):
    """A number of ours with its interval, where there is one, and the paper's."""

    ours: float | None
    interval: tuple[float, float] | None = None
    paper: float | None = None

    def text(self, digits: int = 2) -> str:
        """`ours [low, high] (paper)`."""
        if self.ours is None:
            ours = ABSENT
        else:
            ours = f"{self.ours:.{digits}f}"
            if self.interval is not None:
                ours += " [{:.{d}f}, {:.{d}f}]".format(*self.interval, d=digits)
        return ours if self.paper is None else f"{ours} ({self.paper:g})"


Rows = Mapping[str, Mapping[str, Entry]]
"""Name of a row -> name of a column -> entry."""
MutableRows = dict[str, dict[str, Entry]]


def open_bench() -> Bench:
    """By the flags."""
    return Bench(find_scale(SCALE.value), DATA.value, Path(WORKDIR.value), Path(RESULTS.value), RUN.value)


def score(result: Mapping[str, Any] | None, name: str = "rougeL", paper: float | None = None) -> Entry:
    """A score of a cell."""
    return estimated(result, f"score/{name}", paper)


def estimated(result: Mapping[str, Any] | None, name: str, paper: float | None = None) -> Entry:
    """A mean of a cell, with its interval."""
    if result is None:
        return Entry(None, paper=paper)
    mean, low, high = result[name]
    return Entry(mean, (low, high), paper)


def number(result: Mapping[str, Any] | None, name: str, paper: float | None = None, times: float = 1.0) -> Entry:
    """Another number of a cell or training."""
    found = None if result is None else result.get(name)
    return Entry(None if found is None else times * found, paper=paper)


def by_task(tables: Mapping[str, Mapping[str, Cell]], entry: Callable[[str, str, Cell], Entry]) -> MutableRows:
    """A column for each task and a row for each name of a cell.

    Args:
        tables: task -> name of a row -> cell.
        entry: of a row's name, a task and a cell.
    """
    rows: MutableRows = {}
    for task, cells in tables.items():
        for name, cell in cells.items():
            rows.setdefault(name, {})[TITLES[task]] = entry(name, task, cell)
    return rows


def scores(bench: Bench, tables: Mapping[str, Mapping[str, Cell]], paper: Mapping[str, Sequence[float]]) -> MutableRows:
    """ROUGE-L `by_task`, beside the paper's: name of a row -> a number for each of TASKS."""

    def entry(name: str, task: str, cell: Cell) -> Entry:
        said = paper[name][TASKS.index(task)] if name in paper and task in TASKS else None
        return score(bench.result(cell), paper=said)

    return by_task(tables, entry)


def mean(entries: Iterable[Entry], paper: float | None = None) -> Entry:
    """Of these entries, once all of them are there."""
    found = [entry.ours for entry in entries]
    known = [ours for ours in found if ours is not None]
    return Entry(sum(known) / len(known) if known and len(known) == len(found) else None, paper=paper)


def write(bench: Bench, name: str, title: str, rows: Rows, notes: Sequence[str] = (), plot: bool = True) -> None:
    """Prints the table and writes `NAME.json`, `NAME.md` and `NAME.png` into the results of the scale."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table, hardware = Table(title, *columns), bench.hardware()
    lines = [f"# {title}", "", f"`python -m experiments.{name} --scale={bench.scale.name}`; {hardware}.", ""]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label, row in rows.items():
        cells = [row[column].text() if column in row else "" for column in columns]
        table.add_row(label, *cells)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "In brackets the 95 % bootstrap interval, in parentheses the paper's number.", ""]
    lines += [f"Scale: {bench.scale.changes}", *(line for note in notes for line in ("", note)), ""]
    Console(width=200).print(table)
    record = {
        "command": f"python -m experiments.{name} --scale={bench.scale.name}",
        "hardware": hardware,
        "rows": {label: {column: entry._asdict() for column, entry in row.items()} for label, row in rows.items()},
        "notes": [bench.scale.changes, *notes],
    }
    write_json(bench.results / f"{name}.json", record)
    write_bytes(bench.results / f"{name}.md", "\n".join(lines).encode())
    if plot:
        _plot(bench.results / f"{name}.png", title, rows, columns)


def _plot(path: Path, title: str, rows: Rows, columns: Sequence[str]) -> None:
    """A group of bars for each column, a bar for each row; the paper's numbers as marks."""
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


def _error(entry: Entry) -> tuple[float, float]:
    if entry.interval is None or entry.ours is None or not np.isfinite(entry.interval).all():
        return 0.0, 0.0
    return max(entry.ours - entry.interval[0], 0.0), max(entry.interval[1] - entry.ours, 0.0)


def main_of(report: Any) -> None:
    """Runs a module's `report(bench)` as a command."""
    command.run(lambda: report(open_bench()))


__all__ = [
    "Bench",
    "Entry",
    "Rows",
    "Scale",
    "by_task",
    "estimated",
    "main_of",
    "mean",
    "number",
    "open_bench",
    "plt",
    "score",
    "scores",
    "write",
]
