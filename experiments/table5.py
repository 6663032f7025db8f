"""Tables 5 to 7: training sizes, and what SPA makes of them.

python -m experiments.table5 --scale=mini --data=DIR     (sizes)
python -m experiments.table6 --scale=mini --data=DIR     (ROUGE-L)
python -m experiments.table7 --scale=mini --data=DIR     (share of tokens the device is asked for)
"""

from experiments.cells import Bench, Cell, Training
from experiments.report import Entry, by_task, main_of, number, write
from experiments.scales import SIZES, TASKS, Scale
from spa_jax.data.tasks import TASKS as DATA_SETS


def columns(scale: Scale) -> list[str]:
    """The tasks there are sizes of."""
    return [task for task in (*TASKS, "sciq_closed_book") if task in scale.sizes]


def table(task: str) -> dict[str, Cell]:
    """A cell for each size."""
    return {size: Cell(task, "spa", Training(task, size)) for size in SIZES}


def cells(scale: Scale) -> list[Cell]:
    return [cell for task in columns(scale) for cell in table(task).values()]


def tables(scale: Scale) -> dict[str, dict[str, Cell]]:
    """Of each task the cells by the names of their rows."""
    return {task: {f"SPA {size}": cell for size, cell in table(task).items()} for task in columns(scale)}


def report(bench: Bench) -> None:
    def entry(_name: str, task: str, cell: Cell) -> Entry:
        assert cell.training is not None
        known = DATA_SETS[task]
        paper = None if task not in TASKS else known.sizes.get(cell.training.size, known.paper_full)
        return number(bench.summary(cell.training), "data/train_questions", paper)

    rows = by_task(tables(bench.scale), entry)
    notes = [
        "Rows of the training split; of CoQA questions. Each size is the first part of one shuffle, so a smaller one "
        "is part of every larger one.",
    ]
    write(bench, "table5", "Table 5: training sizes", rows, notes, plot=False)


if __name__ == "__main__":
    main_of(report)
