"""Claims by paired intervals over the same questions."""

import json

import pytest

from experiments.paper import claims, tables
from experiments.paper.cells import cell_of, plugin_training
from experiments.paper.scales import MINI


def verdicts(store):
    claims.report(store)
    rows = json.loads((store.results / "claims.json").read_text())["rows"]
    return {row["claim"]: row["verdict"] for row in rows}


def test_claims_are_judged_by_paired_differences(store, keep_cell):
    three = tables.settings(MINI, "sciq")
    common = [float(10 * i) for i in range(10)]  # far apart from each other, and always 1 or 2 higher
    keep_cell(store, three["SPA"], [score + 1 + i % 2 for i, score in enumerate(common)])
    keep_cell(store, three["S2"], common)
    keep_cell(store, three["S1"], [score + (5 if i % 2 else -5) for i, score in enumerate(common)])
    found = claims.difference(store, three["SPA"], three["S2"], "rougeL")
    assert found.mean == pytest.approx(1.5)
    assert 1 <= found.low < found.high <= 2
    assert claims.verdict(found) == "held"
    assert claims.verdict(claims.difference(store, three["S2"], three["SPA"], "rougeL")) == "against"
    assert claims.verdict(claims.difference(store, three["S1"], three["SPA"], "rougeL")) == "open"
    assert verdicts(store) == {"SPA above S2": "held", "S1 above SPA": "open"}


def test_a_share_is_compared_question_by_question(store, keep_cell):
    by_size = tables.sizes(MINI, "sciq")
    keep_cell(store, by_size["SPA small"], [1.0] * 20, sources="dddc")
    keep_cell(store, by_size["SPA medium"], [1.0] * 20, sources="ddcccccc")
    found = claims.difference(store, by_size["SPA small"], by_size["SPA medium"], "share")
    assert found == pytest.approx((50, 50, 50))
    assert verdicts(store) == {"medium data above small": "open", "medium data asks the device less than small": "held"}


def test_claims_repeat_no_bootstrap_of_the_tables(store, keep_cell, monkeypatch):
    three = tables.settings(MINI, "sciq")
    for name in ("SPA", "S2"):
        keep_cell(store, three[name], [1.0, 2.0])
    monkeypatch.setattr(type(store), "result", lambda *_: None)  # what bootstraps a cell; None is of one not done
    assert verdicts(store) == {"SPA above S2": "open"}


def test_claims_are_of_cells_that_are_in_tables_and_about_two_different_ones():
    shown = {*tables.cells(MINI), *claims.table2.cells(MINI)}
    found = claims.claims(MINI)
    assert {cell for claim in found for cell in (claim.above, claim.below)} <= shown
    assert all(claim.above != claim.below and claim.task == claim.above.task == claim.below.task for claim in found)
    assert len({(claim.above, claim.below, claim.score) for claim in found}) == len(found)


def test_what_is_remarked_on_a_training_stands_below_its_claims(store, keep_cell, keep_record):
    three, offset = tables.settings(MINI, "sciq"), plugin_training(MINI, "sciq", offset=True)
    keep_record(store, "trainings", offset.label, {"description": offset.description, "note": "with decay."})
    for cell in (three["S1"], cell_of(offset, budget=0.62)):
        keep_cell(store, cell, [1.0, 2.0])
    assert verdicts(store) == {"S1 above SPA with offset at 0.62": "open"}
    assert (store.results / "claims.md").read_text().endswith("\nS1 above SPA with offset at 0.62: with decay.\n")
