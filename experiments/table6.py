"""Table 6: ROUGE-L of SPA by training size.

python -m experiments.table6 --scale=mini --data=DIR
"""

from experiments.cells import Bench
from experiments.report import main_of, score, write
from experiments.scales import SIZES, TASKS
from experiments.table5 import by_size, cells, columns, table

PAPER = {"small": (31.5, 36.2, 34.7, 22.1), "medium": (33.8, 38.4, 36.2, 23.8), "full": (35.5, 39.2, 37.3, 25.4)}

__all__ = ["cells", "report"]


def report(bench: Bench) -> None:
    entries = {
        size: {
            task: score(
                bench.result(table(task)[size]), paper=PAPER[size][TASKS.index(task)] if task in TASKS else None
            )
            for task in columns(bench.scale)
        }
        for size in SIZES
    }
    write(bench, "table6", "Table 6: ROUGE-L of SPA by training size", by_size(bench, entries))


if __name__ == "__main__":
    main_of(report)
