"""Tables as grids of cells: what is in their rows and columns, and which numbers each cell shows."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from experiments.paper.cells import Cell
from experiments.paper.report import Rows, TableEntry, entry, mean, write
from experiments.paper.scales import TASKS, TITLES, Scale
from experiments.paper.store import CellStore

Grid = dict[str, dict[str, Cell | None]]
"""Name of a row -> name of a group of columns, such as a task's title, or empty -> cell; None for what only the paper
has."""
PaperNumbers = Mapping[str, Mapping[str, float]]
"""Name of a row -> name of a group -> number."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric that every group shows.

    Attributes:
        metric: key of a cell's result, in which `{setting}` stands for the cell's setting.
        title: follows the group's name.
        of_training: whether it is a key of the training's record instead.
        factor: multiplies it.
        digits: decimal places.
        paper: the paper's numbers.
        mean: title of the column with the mean over the paper's tasks; empty for none.
        paper_means: the paper's, by row.
    """

    metric: str
    title: str = ""
    of_training: bool = False
    factor: float = 1.0
    digits: int = 2
    paper: PaperNumbers = dataclasses.field(default_factory=dict)
    mean: str = ""
    paper_means: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def entry(self, store: CellStore, row: str, group: str, cell: Cell | None) -> TableEntry:
        """Returns what a cell shows in this column."""
        if cell is None:
            result = None
        elif self.of_training:
            assert cell.training is not None
            result = store.summary(cell.training)
        else:
            result = store.result(cell)
        metric = self.metric if cell is None else self.metric.format(setting=cell.setting)
        return entry(result, metric, self.paper.get(row, {}).get(group), self.factor)


class Table:
    """Cells in rows, and groups of columns."""

    def __init__(
        self,
        title: str,
        grid: Callable[[Scale], Grid],
        *columns: Column,
        note: str = "",
        plot: Callable[[Path, str, Rows], None] | None = None,
        folder: str = "",
        caption: Callable[[Scale], str] | None = None,
    ) -> None:
        """Describes a table.

        Args:
            title: of the table.
            grid: returns its cells at a scale.
            columns: what is shown of each cell.
            note: what is said below the table.
            plot: draws the table into a file, from its title and rows; None for no plot.
            folder: with which its cells' labels begin, with a slash, such as `ablations/`; empty for none.
            caption: returns what its cells are, in place of the scale's caption.
        """
        self.title, self.grid, self.columns, self.note = title, grid, columns, note
        self.plot, self.folder, self.caption = plot, folder, caption

    def rows(self, store: CellStore) -> Rows:
        """Returns all entries; columns with a mean have it after the groups."""
        grid = self.grid(store.scale)
        rows: Rows = {row: {} for row in grid}
        for column in self.columns:
            for row, groups in grid.items():
                found = {group: column.entry(store, row, group, cell) for group, cell in groups.items()}
                rows[row] |= {f"{group} {column.title}".strip(): each for group, each in found.items()}
                if column.mean:
                    four = [found[TITLES[task]] for task in TASKS]
                    rows[row][column.mean] = mean(four, column.paper_means.get(row))
        return rows

    def write(self, store: CellStore, name: str) -> None:
        """Prints the table and writes its files."""
        grid, caption = self.grid(store.scale), self.caption and self.caption(store.scale)
        if not grid:
            return
        rows, notes = self.rows(store), [self.note] if self.note else []
        notes += store.notes((row, cell) for row, groups in grid.items() for cell in groups.values())
        names = {group for groups in grid.values() for group in groups}
        digits = {f"{group} {column.title}".strip(): column.digits for column in self.columns for group in names}
        write(store, name, f"tables {name}", self.title, rows, notes, digits, self.folder, caption)
        if self.plot is not None:
            self.plot(store.results / f"{name}.png", self.title, rows)


def by_task(cells: Callable[[Scale, str], Mapping[str, Cell]], tasks: Iterable[str] = TASKS) -> Callable[[Scale], Grid]:
    """Arranges a task's cells, by the names of their rows, as one group of columns; of tasks that the scale has."""

    def grid(scale: Scale) -> Grid:
        rows: Grid = {}
        for task in tasks:
            for row, cell in (cells(scale, task) if task in scale.sizes else {}).items():
                rows.setdefault(row, {})[TITLES[task]] = cell
        return rows

    return grid


def paper_by_task(rows: Mapping[str, Iterable[float]]) -> PaperNumbers:
    """Names the paper's numbers of its tasks, in their order."""
    return {row: dict(zip((TITLES[task] for task in TASKS), numbers)) for row, numbers in rows.items()}


def rouge_l(paper: Mapping[str, Iterable[float]]) -> Column:
    """Describes columns of ROUGE-L beside the paper's, which are one for each of its tasks."""
    return Column("score/rougeL", paper=paper_by_task(paper))
