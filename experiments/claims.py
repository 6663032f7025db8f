"""Which of the paper's claims come back, by paired bootstrap intervals over the same test questions.

    python -m experiments.claims --scale=mini --data=DIR [--norun]

A claim "A above B" is *held* where the 95 % interval of the difference lies above zero, *against* where it lies below,
and *open* where zero is inside. Rows are paired by question, and resampled by row (of CoQA by story).
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import table1, table3, table5
from experiments.ablation import hardware
from experiments.cells import Bench, Cell, Training
from experiments.report import main_of
from experiments.scales import SIZES, TASKS, TITLES, Scale
from spa_jax.files import write_bytes, write_json
from spa_jax.scoring.bootstrap import Estimate, estimate


class Claim(NamedTuple):
    """The first cell scores above the second one."""

    says: str
    task: str
    above: Cell
    below: Cell
    score: str = "rougeL"


def claims(scale: Scale) -> list[Claim]:
    found = []
    for task in TASKS:
        one, three = table1.table(task), table3.table(task)
        pairs = {
            "SPA above one-shot": (one["SPA"], one["one-shot"]),
            "SPA above LST (S3)": (one["SPA"], one["LST"]),
            "SPA above S2": (three["SPA"], three["S2"]),
            "S2 above S3": (three["S2"], three["S3"]),
            "S1 above SPA": (three["S1"], three["SPA"]),
            "parallel (S1) above sequential (S3)": (three["S1"], three["S3"]),
        }
        found += [Claim(says, task, *cells) for says, cells in pairs.items()]
    for task in table5.columns(scale):
        by_size = table5.table(task)
        for smaller, larger in itertools.pairwise(SIZES):
            found.append(Claim(f"{larger} data above {smaller}", task, by_size[larger], by_size[smaller]))
    for task in scale.through_epochs:
        ours = Cell(task, "spa", Training(task, short=True, epochs=scale.through_epochs[task]))
        for method in ("lora", "adapter"):
            trained = Training(task, setting=method, epochs=scale.through_epochs[task])
            found.append(Claim(f"{method} above SPA", task, Cell(task, method, trained), ours))
    return found


def cells(scale: Scale) -> list[Cell]:
    return [cell for claim in claims(scale) for cell in (claim.above, claim.below)]


def difference(bench: Bench, above: Cell, below: Cell, score: str) -> Estimate:
    """Of the scores, question by question."""
    a, b = ({row.id: row for row in bench.predictions(cell)} for cell in (above, below))
    both = [name for name in a if name in b]
    differences = np.array([a[name].scores[score] - b[name].scores[score] for name in both])
    return estimate(differences, [a[name].group for name in both])


def verdict(found: Estimate) -> str:
    """`held`, `against` or `open`."""
    return "held" if found.low > 0 else "against" if found.high < 0 else "open"


def report(bench: Bench) -> None:
    lines = [f"# Claims of the paper at the {bench.scale.name} scale", "", f"{hardware()}. {bench.scale.changes}", ""]
    lines += ["| claim | data | difference in ROUGE-L | |", "|---|---|---|---|"]
    records: list[Mapping[str, Any]] = []
    for claim in claims(bench.scale):
        if bench.result(claim.above) is None or bench.result(claim.below) is None:
            lines.append(f"| {claim.says} | {TITLES[claim.task]} | - | not run |")
            continue
        found = difference(bench, claim.above, claim.below, claim.score)
        text = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        lines.append(f"| {claim.says} | {TITLES[claim.task]} | {text} | {verdict(found)} |")
        records.append({"claim": claim.says, "task": claim.task, **found._asdict(), "verdict": verdict(found)})
    print("\n".join(lines))
    command = f"python -m experiments.claims --scale={bench.scale.name}"
    write_json(
        bench.results / "claims.json", {"command": command, "hardware": hardware(), "confidence": 0.95, "rows": records}
    )
    write_bytes(bench.results / "claims.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main_of(report)
