"""Table 7: the share of generated tokens the device is asked for, by training size: of each data set, and the mean.

python -m experiments.table7 --scale=mini --data=DIR
"""

from experiments.cells import Bench
from experiments.report import main_of, mean, number, write
from experiments.scales import SIZES, TASKS
from experiments.table5 import by_size, cells, columns, table

PAPER = {"small": 82.3, "medium": 71.5, "full": 61.8}

__all__ = ["cells", "report"]


def report(bench: Bench) -> None:
    entries = {
        size: {
            task: number(bench.result(table(task)[size]), "consulted_share", times=100) for task in columns(bench.scale)
        }
        for size in SIZES
    }
    rows = {name: dict(row) for name, row in by_size(bench, entries).items()}
    for size, row in zip(SIZES, rows.values()):
        row["mean of the four"] = mean((entries[size][task] for task in TASKS), PAPER[size])
    notes = [
        "In per cent of generated tokens, EOS included, by beam search. The mean leaves the closed book out. No budget "
        "is set: the threshold is the paper's argmax."
    ]
    write(bench, "table7", "Table 7: share of tokens the device is asked for, by training size", rows, notes)


if __name__ == "__main__":
    main_of(report)
