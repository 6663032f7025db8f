"""The paper's claims, judged by paired bootstrap intervals over the same test questions.

    python -m experiments.paper.claims --scale=mini --data=DIR [--norun]

A claim "A above B" is *held* where the 95 % interval of the difference lies above zero, *against* where it lies below,
and *open* where zero is inside. Rows are paired by question, and resampled by row (of CoQA by story). Differences are
of ROUGE-L or, where the claim is how often the device is asked, of a question's generated tokens in per cent.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments.paper import report as reporting
from experiments.paper import table2, tables
from experiments.paper.cells import Cell
from experiments.paper.report import run_report
from experiments.paper.scales import BUDGET, SIZES, TASKS, TITLES, Scale
from experiments.paper.store import CellStore
from spa_jax.files import write_bytes, write_json
from spa_jax.scoring.bootstrap import Estimate, estimate
from spa_jax.scoring.predictions import Prediction

flags.adopt_module_key_flags(reporting)  # --help shows them


class Claim(NamedTuple):
    """The first cell scores above the second one."""

    says: str
    task: str
    above: Cell
    below: Cell
    score: str = "rougeL"
    """Or `share`."""


def claims(scale: Scale) -> list[Claim]:
    """Returns all claims of Tables 1 to 3, 6 and 7 and of Figure 4."""
    found = []
    for task in TASKS:
        one, three = tables.methods(scale, task), tables.settings(scale, task)
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
    for task in TASKS:
        by_size = dict(zip(SIZES, tables.sizes(scale, task).values()))
        for smaller, larger in itertools.pairwise(SIZES):
            found.append(Claim(f"{larger} data above {smaller}", task, by_size[larger], by_size[smaller]))
            says = f"{larger} data asks the device less than {smaller}"
            found.append(Claim(says, task, by_size[smaller], by_size[larger], "share"))
    for task in TASKS:
        entry = tables.entries(scale, task)
        at_budget = tables.AT_INNER
        found.append(Claim(f"{at_budget}, above {tables.AT_HEAD}", task, entry[at_budget], entry[tables.AT_HEAD]))
        found.append(Claim("S1 above SPA, inner", task, entry["S1, inner"], entry[at_budget]))
        if task in scale.replacing:
            pairs = {
                "LST (S3) above one-shot, inner": (entry["LST (S3), inner"], entry["one-shot"]),
                "SPA above LST (S3), inner": (entry["SPA, inner"], entry["LST (S3), inner"]),
                "SPA above S2, inner": (entry["SPA, inner"], entry["S2, inner"]),
            }
            found += [Claim(says, task, *cells) for says, cells in pairs.items()]
        if task in scale.beside_lora:
            found.append(Claim(f"lora above {at_budget}", task, entry["LoRA"], entry[at_budget]))
    for task in tables.FIGURE4_TASKS:
        lines = (tables.epochs(scale, task, setting) for setting in (tables.PARALLEL, tables.SEQUENTIAL))
        parallel, sequential = lines
        for epochs in tables.FIGURE4_EPOCHS[:-1]:  # the last is Table 3's
            says = f"parallel above sequential after {epochs} epochs"
            found.append(Claim(says, task, parallel[epochs], sequential[epochs]))
    for task in scale.table2:
        cells = table2.methods(scale, task)
        for name in ("LoRA", "Adapter"):
            found.append(Claim(f"{name.lower()} above SPA", task, cells[name], cells["SPA"]))
    return found


def difference(store: CellStore, above: Cell, below: Cell, score: str) -> Estimate:
    """Bootstraps the mean difference of scores, or of shares in per cent, question by question."""
    a, b = ({row.id: row for row in store.predictions(cell)} for cell in (above, below))
    both = [name for name in a if name in b]
    differences = np.array([_value(a[name], score) - _value(b[name], score) for name in both])
    return estimate(differences, [a[name].group for name in both])


def _value(row: Prediction, score: str) -> float:
    return 100 * row.sources.count("d") / len(row.sources) if score == "share" else row.scores[score]


def verdict(found: Estimate) -> str:
    """Returns `held`, `against` or `open`."""
    return "held" if found.low > 0 else "against" if found.high < 0 else "open"


def report(store: CellStore) -> None:
    title = f"# Claims of the paper at the {store.scale.name} scale"
    hardware = store.hardware()
    lines = [title, "", f"{hardware}. {store.scale.caption}", "", f"Of more data: {store.scale.by_size_caption}", ""]
    lines += ["| claim | data | difference | |", "|---|---|---|---|"]
    records: list[Mapping[str, Any]] = []
    done = []
    for claim in claims(store.scale):
        if not (_done(store, claim.above) and _done(store, claim.below)):
            lines.append(f"| {claim.says} | {TITLES[claim.task]} | - | not run |")
            continue
        done.append(claim)
        found = difference(store, claim.above, claim.below, claim.score)
        text = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        lines.append(f"| {claim.says} | {TITLES[claim.task]} | {text} | {verdict(found)} |")
        records.append({"claim": claim.says, "task": claim.task, **found._asdict(), "verdict": verdict(found)})
    notes = store.notes((claim.says, cell) for claim in done for cell in (claim.above, claim.below))
    lines += [line for note in notes for line in ("", note)]
    print("\n".join(lines))
    command = f"python -m experiments.paper.claims --scale={store.scale.name}"
    record = {"command": command, "hardware": hardware, "confidence": 0.95, "rows": records, "notes": notes}
    write_json(store.results / "claims.json", record)
    write_bytes(store.results / "claims.md", ("\n".join(lines) + "\n").encode())


def _done(store: CellStore, cell: Cell) -> bool:
    """Runs the cell where that is allowed, and says whether it is done; scores are not needed here."""
    return store.done(cell) or store.result(cell) is not None


if __name__ == "__main__":
    run_report(report)
