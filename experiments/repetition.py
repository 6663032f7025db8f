"""How much of what the models of Tables 1, 3 and 6 say they have said before (not in the paper).

Where a beam search runs in circles, ROUGE falls though the loss does too.

    python -m experiments.repetition --scale=mini --data=DIR
"""

from experiments import table1, table3, table5
from experiments.cells import Bench, Cell
from experiments.report import estimated, main_of, write
from experiments.scales import TASKS, TITLES, Scale


def table(task: str, scale: Scale) -> dict[str, Cell]:
    """The cells of a column."""
    settings = {name: cell for name, cell in table3.table(task).items() if name != "SPA"}
    sizes = {f"SPA {size}": cell for size, cell in table5.table(task).items()}
    return {"one-shot": table1.table(task, scale)["one-shot"], **sizes, **settings}


def cells(scale: Scale) -> list[Cell]:
    return [cell for task in TASKS for cell in table(task, scale).values()]


def report(bench: Bench) -> None:
    by_task = {task: table(task, bench.scale) for task in TASKS}
    rows = {
        name: {TITLES[task]: estimated(bench.result(by_task[task][name]), "repetition") for task in TASKS}
        for name in by_task[TASKS[0]]
    }
    notes = ["In per cent of each text's runs of four words, those that it has had before (Welleck et al. 2020)."]
    write(bench, "repetition", "Repetition", rows, notes)


if __name__ == "__main__":
    main_of(report)
