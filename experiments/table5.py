"""Tables 5 to 7: training sizes, and what SPA makes of them.

python -m experiments.table5 --scale=mini --data=DIR     (sizes)
python -m experiments.table6 --scale=mini --data=DIR     (ROUGE-L)
python -m experiments.table7 --scale=mini --data=DIR     (share of tokens the device is asked for)
"""

from experiments.cells import Bench, Cell, Training
from experiments.report import Entry, Rows, main_of, number, write
from experiments.scales import SIZES, TASKS, TITLES, Scale
from spa_jax.data.tasks import TASKS as DATA_SETS


def columns(scale: Scale) -> list[str]:
    """The tasks there are sizes of."""
    return [task for task in (*TASKS, "sciq_closed_book") if task in scale.sizes]


def table(task: str) -> dict[str, Cell]:
    """A cell for each size."""
    return {size: Cell(task, "spa", Training(task, size)) for size in SIZES}


def cells(scale: Scale) -> list[Cell]:
    return [cell for task in columns(scale) for cell in table(task).values()]


def by_size(bench: Bench, entry: dict[str, dict[str, Entry]]) -> Rows:
    """`{size: {task: entry}}` with the rows' and columns' names."""
    return {f"SPA {size}": {TITLES[task]: found for task, found in row.items()} for size, row in entry.items()}


def report(bench: Bench) -> None:
    entries: dict[str, dict[str, Entry]] = {size: {} for size in SIZES}
    for task in columns(bench.scale):
        known = DATA_SETS[task]
        for size in SIZES:
            paper = None if task not in TASKS else known.sizes.get(size, known.paper_full)
            found = number(bench.summary(Training(task, size)), "data/train_questions", paper)
            entries[size][task] = found
    notes = [
        "Rows of the training split; of CoQA questions. Each size is the first part of one shuffle, so a smaller one "
        "is part of every larger one.",
    ]
    write(bench, "table5", "Table 5: training sizes", by_size(bench, entries), notes, plot=False)


if __name__ == "__main__":
    main_of(report)
