"""Table 6: ROUGE-L of SPA by training size.

python -m experiments.table6 --scale=mini --data=DIR
"""

from experiments.cells import Bench
from experiments.report import main_of, scores, write
from experiments.table5 import cells, tables

PAPER = {
    "SPA small": (31.5, 36.2, 34.7, 22.1),
    "SPA medium": (33.8, 38.4, 36.2, 23.8),
    "SPA full": (35.5, 39.2, 37.3, 25.4),
}

__all__ = ["cells", "report"]


def report(bench: Bench) -> None:
    rows = scores(bench, tables(bench.scale), PAPER)
    write(bench, "table6", "Table 6: ROUGE-L of SPA by training size", rows)


if __name__ == "__main__":
    main_of(report)
