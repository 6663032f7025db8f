"""Which of the paper's claims come back, by paired bootstrap intervals over the same test questions.

    python -m experiments.claims --scale=mini --data=DIR [--norun]

A claim "A above B" is *held* where the 95 % interval of the difference lies above zero, *against* where it lies below,
and *open* where zero is inside. Rows are paired by question, and resampled by row (of CoQA by story). Differences are
of ROUGE-L or, where the claim is how often the device is asked, of a question's generated tokens in per cent.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import figure4, table1, table3, table5
from experiments.cells import Bench, Cell, Training
from experiments.report import main_of
from experiments.scales import BUDGET, SIZES, TASKS, TITLES, Scale
from spa_jax.files import write_bytes, write_json
from spa_jax.scoring.bootstrap import Estimate, estimate
from spa_jax.scoring.predictions import Prediction


class Claim(NamedTuple):
    """The first cell scores above the second one."""

    says: str
    task: str
    above: Cell
    below: Cell
    score: str = "rougeL"
    """Or `share`."""


def claims(scale: Scale) -> list[Claim]:
    found = []
    for task in TASKS:
        one, three = table1.table(task, scale), table3.table(task)
        pairs = {
            "LST (S3) above one-shot": (one["LST"], one["one-shot"]),
            "SPA above one-shot": (one["SPA"], one["one-shot"]),
            "SPA above LST (S3)": (one["SPA"], one["LST"]),
            "SPA above S2": (three["SPA"], three["S2"]),
            "S2 above S3": (three["S2"], three["S3"]),
            "S1 above SPA": (three["S1"], three["SPA"]),
            f"S1 above SPA at {BUDGET}": (three["S1"], three[f"SPA at {BUDGET}"]),
            f"S1 above SPA with offset at {BUDGET}": (three["S1"], three[f"SPA with offset at {BUDGET}"]),
            "parallel (S1) above sequential (S3)": (three["S1"], three["S3"]),
        }
        found += [Claim(says, task, *cells) for says, cells in pairs.items()]
    for task in table5.columns(scale):
        by_size = table5.table(task)
        for smaller, larger in itertools.pairwise(SIZES):
            found.append(Claim(f"{larger} data above {smaller}", task, by_size[larger], by_size[smaller]))
            says = f"{larger} data asks the device less than {smaller}"
            found.append(Claim(says, task, by_size[smaller], by_size[larger], "share"))
    for task, epochs in itertools.product(figure4.TASKS, figure4.EPOCHS[:-1]):
        parallel, sequential = (figure4.cell(task, name, epochs) for name in figure4.SETTINGS)
        found.append(Claim(f"parallel above sequential after {epochs} epochs", task, parallel, sequential))
    for task in scale.through_epochs:
        ours = Cell(task, "spa", Training(task, short=True, epochs=scale.through_epochs[task]))
        for method in ("lora", "adapter"):
            trained = Training(task, setting=method, epochs=scale.through_epochs[task])
            found.append(Claim(f"{method} above SPA", task, Cell(task, method, trained), ours))
    return found


def cells(scale: Scale) -> list[Cell]:
    return [cell for claim in claims(scale) for cell in (claim.above, claim.below)]


def difference(bench: Bench, above: Cell, below: Cell, score: str) -> Estimate:
    """Of the scores, or shares in per cent, question by question."""
    a, b = ({row.id: row for row in bench.predictions(cell)} for cell in (above, below))
    both = [name for name in a if name in b]
    differences = np.array([_value(a[name], score) - _value(b[name], score) for name in both])
    return estimate(differences, [a[name].group for name in both])


def _value(row: Prediction, score: str) -> float:
    return 100 * row.sources.count("d") / len(row.sources) if score == "share" else row.scores[score]


def verdict(found: Estimate) -> str:
    """`held`, `against` or `open`."""
    return "held" if found.low > 0 else "against" if found.high < 0 else "open"


def report(bench: Bench) -> None:
    title = f"# Claims of the paper at the {bench.scale.name} scale"
    hardware = bench.hardware()
    lines = [title, "", f"{hardware}. {bench.scale.changes}", ""]
    lines += ["| claim | data | difference | |", "|---|---|---|---|"]
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
    record = {"command": command, "hardware": hardware, "confidence": 0.95, "rows": records}
    write_json(bench.results / "claims.json", record)
    write_bytes(bench.results / "claims.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main_of(report)
