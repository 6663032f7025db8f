"""How much of what the models of Tables 1, 3 and 6 say they have said before (not in the paper).

Where a beam search runs in circles, ROUGE falls though the loss does too.

    python -m experiments.repetition --scale=mini --data=DIR
"""

from experiments import table1, table3, table5
from experiments.cells import Bench, Cell
from experiments.report import by_task, estimated, main_of, write
from experiments.scales import TASKS, Scale


def table(task: str, scale: Scale) -> dict[str, Cell]:
    """The cells of a column."""
    settings = table3.table(task)
    smaller = {f"SPA {size}": cell for size, cell in table5.table(task).items() if cell not in settings.values()}
    return {"one-shot": table1.table(task, scale)["one-shot"], **smaller, **settings}


def cells(scale: Scale) -> list[Cell]:
    return [cell for task in TASKS for cell in table(task, scale).values()]


def report(bench: Bench) -> None:
    tables = {task: table(task, bench.scale) for task in TASKS}
    rows = by_task(tables, lambda _name, _task, cell: estimated(bench.result(cell), "repetition"))
    notes = ["In per cent of each text's runs of four words, those that it has had before (Welleck et al. 2020)."]
    write(bench, "repetition", "Repetition", rows, notes)


if __name__ == "__main__":
    main_of(report)
