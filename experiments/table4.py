"""Table 4: what the side network changes, and whether the router finds the places; see `spa_jax.scoring.effect`.

python -m experiments.table4 --scale=mini --data=DIR
"""

from experiments.cells import Bench, Cell, Training
from experiments.report import Entry, main_of, number, write
from experiments.scales import TASKS, TITLES, Scale

PAPER = {"% param": 0.21, "M": 0.62, "diff rate": 78.2, "diff pick rate": 56.8}


def cells(scale: Scale) -> list[Cell]:
    return [Cell(task, "spa", Training(task)) for task in TASKS]


def report(bench: Bench) -> None:
    rows: dict[str, dict[str, Entry]] = {"paper (LLaMA-7B)": {name: Entry(None, paper=x) for name, x in PAPER.items()}}
    for cell in cells(bench.scale):
        result, trained = bench.result(cell), bench.summary(Training(cell.task))
        rows[TITLES[cell.task]] = {
            "% param": number(trained, "params/trainable_percent"),
            "M": number(result, "effect/M"),
            "diff rate": number(result, "effect/diff_rate"),
            "diff pick rate": number(result, "effect/diff_pick_rate"),
        }
    notes = ["Along the greedy generations of the first 128 test questions. The paper does not say on which data."]
    write(bench, "table4", "Table 4: the effect of the side network", rows, notes, plot=False)


if __name__ == "__main__":
    main_of(report)
