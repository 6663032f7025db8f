"""Table 1: ROUGE-L of one-shot prompting, LST and SPA on the four data sets.

    python -m experiments.table1 --scale=mini --data=DIR

LST and SPA have the token-wise side network, and below them, on the scale's tasks for it, the transformer that LST has.
"""

from experiments.cells import Bench, Cell, Training
from experiments.report import main_of, scores, write
from experiments.scales import TASKS, Scale

PAPER = {
    "one-shot": (17.32, 22.36, 15.32, 17.21),
    "LST": (28.18, 32.15, 31.24, 23.24),
    "SPA": (35.52, 39.22, 37.30, 25.38),
}


def table(task: str, scale: Scale) -> dict[str, Cell]:
    """The cells of a column."""
    found = {
        "one-shot": Cell(task, "base", shots=1),
        "LST": Cell(task, "s3", Training(task, setting="s2")),
        "SPA": Cell(task, "spa", Training(task)),
    }
    if task in scale.transformer:
        found["LST, transformer"] = Cell(task, "s3", Training(task, setting="s2", kind="transformer"))
        found["SPA, transformer"] = Cell(task, "spa", Training(task, kind="transformer"))
    return found


def cells(scale: Scale) -> list[Cell]:
    return [cell for task in TASKS for cell in table(task, scale).values()]


def report(bench: Bench) -> None:
    rows = scores(bench, {task: table(task, bench.scale) for task in TASKS}, PAPER)
    write(bench, "table1", "Table 1: ROUGE-L of one-shot prompting, LST and SPA", rows)


if __name__ == "__main__":
    main_of(report)
