"""Table 7: the share of generated tokens the device is asked for, by training size: of each data set, and the mean.

python -m experiments.table7 --scale=mini --data=DIR
"""

from experiments.cells import Bench, Cell
from experiments.report import Entry, by_task, main_of, mean, number, write
from experiments.scales import TASKS, TITLES
from experiments.table5 import cells, tables

PAPER = {"SPA small": 82.3, "SPA medium": 71.5, "SPA full": 61.8}

__all__ = ["cells", "report"]


def report(bench: Bench) -> None:
    def share(_name: str, _task: str, cell: Cell) -> Entry:
        return number(bench.result(cell), "consulted_share", times=100)

    rows = by_task(tables(bench.scale), share)
    for name, row in rows.items():
        row["mean of the four"] = mean((row[TITLES[task]] for task in TASKS), PAPER[name])
    notes = [
        "In per cent of generated tokens, EOS included, by beam search. The mean leaves the closed book out. No budget "
        "is set: the threshold is the paper's argmax."
    ]
    write(bench, "table7", "Table 7: share of tokens the device is asked for, by training size", rows, notes)


if __name__ == "__main__":
    main_of(report)
