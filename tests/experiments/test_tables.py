"""Tables from stored predictions alone, cells that are done once, and claims by paired intervals."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import cells as cells_module
from experiments import claims, run, table1, table3, table5, table6, table7
from experiments.cells import Bench, Cell, Training
from experiments.report import Entry
from experiments.scales import MINI, PAPER, SCALES, find_scale
from spa_jax.errors import UserError
from spa_jax.scoring.predictions import Prediction, Predictions

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def store(bench, cell, scores, sources="cd"):
    """A finished cell with these ROUGE-L scores."""
    path = bench.results / "predictions" / f"{cell.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [Prediction(str(i), "0" * 16, "text", sources, {"rougeL": score}) for i, score in enumerate(scores, start=1)]
    Predictions(path, {"task": cell.task}).add(rows)
    (bench.results / "cells").mkdir(exist_ok=True)
    kept = {"cell": cell.name, "hardware": "what it ran on", "loss/base": 4.0}
    (bench.results / "cells" / f"{cell.name}.json").write_text(json.dumps(kept))


@pytest.fixture
def bench(tmp_path):
    """May not run anything."""
    return Bench(MINI, "", tmp_path / "runs", tmp_path / "results", run=False)


def test_a_table_needs_no_model_and_shows_what_is_not_done(bench, monkeypatch):
    monkeypatch.setattr(cells_module, "load_backbone", lambda *_: pytest.fail("a model was loaded"))
    store(bench, table1.table("sciq", MINI)["SPA"], [10.0, 20.0, 60.0])
    table1.report(bench)
    rows = json.loads((bench.results / "table1.json").read_text())["rows"]
    assert rows["SPA"]["SciQ"]["ours"] == pytest.approx(30.0)
    low, high = rows["SPA"]["SciQ"]["interval"]
    assert 10 <= low < 30 < high <= 60
    assert rows["SPA"]["SciQ"]["paper"] == 25.38
    assert rows["SPA"]["XSum"]["ours"] is None
    lines = (bench.results / "table1.md").read_text().splitlines()
    assert any(line.startswith("| SPA | - (35.52) | - (39.22) | - (37.3) | 30.00 [") for line in lines)
    assert any(MINI.changes in line for line in lines)
    assert lines[2] == "`python -m experiments.table1 --scale=mini`; what it ran on."  # and not this machine
    assert (bench.results / "table1.png").stat().st_size > 1000


def test_shares_are_of_generated_tokens_and_their_mean_waits_for_all_four(bench):
    for task in ("xsum", "cnn_dailymail", "coqa"):
        store(bench, table5.table(task)["full"], [1.0, 2.0], sources="ddcc")
    table7.report(bench)
    rows = json.loads((bench.results / "table7.json").read_text())["rows"]["SPA full"]
    assert rows["XSum"]["ours"] == 50
    assert rows["mean of the four"] == {"ours": None, "interval": None, "paper": 61.8}
    store(bench, table5.table("sciq")["full"], [1.0, 2.0], sources="ddddc")
    table7.report(bench)
    rows = json.loads((bench.results / "table7.json").read_text())["rows"]["SPA full"]
    assert rows["mean of the four"]["ours"] == pytest.approx((50 * 3 + 80) / 4)
    table3.report(bench)
    rows = json.loads((bench.results / "table3.json").read_text())["rows"]
    assert rows["SPA"]["mean share"]["ours"] == pytest.approx((0.5 * 3 + 0.8) / 4)
    assert rows["S1"]["mean share"]["ours"] is None


def test_a_table_names_every_machine_its_scale_was_measured_on(bench):
    store(bench, table1.table("sciq", MINI)["SPA"], [10.0, 20.0])
    (bench.results / "latency").mkdir()
    (bench.results / "latency" / "spa.json").write_text(json.dumps({"hardware": "another machine"}))
    table1.report(bench)
    assert "; another machine; what it ran on." in (bench.results / "table1.md").read_text()


def test_a_cell_is_named_by_what_it_is_and_no_two_alike():
    for scale in SCALES.values():
        every = [cell for module in run.MODULES for cell in module.cells(scale)]
        assert len({cell.name for cell in every}) == len(set(every))
    assert Cell("xsum", "s1", Training("xsum")).name == "xsum-full-spa-as-s1"
    assert Cell("xsum", "base", shots=1).name == "xsum-base-one-shot"
    assert Cell("sciq", "spa", Training("sciq", offset=True), budget=0.62).name == "sciq-full-spa-offset-at-0.62"


def test_settings_that_share_a_side_network_share_a_training():
    three = table3.table("xsum")
    assert three["S1"].training == three["SPA"].training == table6.tables(MINI)["xsum"]["SPA full"].training
    assert three["S2"].training == three["S3"].training == table1.table("xsum", MINI)["LST"].training


def test_a_finished_cell_is_not_run_again_and_an_unfinished_one_is(bench, monkeypatch):
    allowed = Bench(MINI, "", bench._workdir.parent, bench.results.parent)
    ran = []
    monkeypatch.setattr(Bench, "_evaluate", lambda self, cell, path: (ran.append(cell.name), store(self, cell, [5.0])))
    cell = Cell("sciq", "base")
    assert bench.result(cell) is None
    assert not bench.done(cell)
    assert allowed.result(cell)["score/rougeL"][0] == 5.0
    assert allowed.result(cell)["loss/base"] == 4.0
    assert bench.done(cell)
    assert ran == ["sciq-base"]


def test_the_learning_rate_is_chosen_once_on_the_medium_size_by_held_out_loss(bench, monkeypatch):
    allowed, ran = Bench(MINI, "", bench._workdir.parent, bench.results.parent), []

    def train(config, _):
        ran.append((config.data.size, config.optimizer.learning_rate))
        if len(ran) == 3:
            raise KeyboardInterrupt
        loss = abs(config.optimizer.learning_rate - 5e-4) + 1
        return {"loss/spa": loss}

    monkeypatch.setattr(cells_module, "train", train)
    monkeypatch.setattr(Bench, "backbone", property(lambda self: pytest.fail("no need")), raising=True)
    monkeypatch.setattr(cells_module, "size_of", lambda *_: 1)
    monkeypatch.setattr(Bench, "backbone", None)
    with pytest.raises(KeyboardInterrupt):
        allowed.train(Training("sciq"))
    assert ran == [("250", 2e-4), ("250", 5e-4), ("250", 1e-3)]
    for size in ("full", "small", "medium"):
        allowed.train(Training("sciq", size))
    assert ran[3:] == [("250", 1e-3), ("full", 5e-4), ("60", 5e-4), ("250", 5e-4)]  # the two that were done are kept
    chosen = json.loads((allowed.results / "rates" / "sciq-medium-spa.json").read_text())
    assert min(chosen["held_out_loss"], key=chosen["held_out_loss"].get) == "0.0005"
    assert json.loads((allowed.results / "trainings" / "sciq-full-spa.json").read_text())["learning_rate"] == 5e-4


def test_claims_are_judged_by_paired_differences(bench):
    three = table3.table("sciq")
    common = [float(10 * i) for i in range(10)]  # far apart from each other, and always 1 or 2 higher
    store(bench, three["SPA"], [score + 1 + i % 2 for i, score in enumerate(common)])
    store(bench, three["S2"], common)
    store(bench, three["S1"], [score + (5 if i % 2 else -5) for i, score in enumerate(common)])
    found = claims.difference(bench, three["SPA"], three["S2"], "rougeL")
    assert found.mean == pytest.approx(1.5)
    assert 1 <= found.low < found.high <= 2
    assert claims.verdict(found) == "held"
    assert claims.verdict(claims.difference(bench, three["S2"], three["SPA"], "rougeL")) == "against"
    assert claims.verdict(claims.difference(bench, three["S1"], three["SPA"], "rougeL")) == "open"
    claims.report(bench)
    verdicts = {row["claim"]: row["verdict"] for row in json.loads((bench.results / "claims.json").read_text())["rows"]}
    assert verdicts == {"SPA above S2": "held", "S1 above SPA": "open"}


def test_a_share_is_compared_question_by_question(bench):
    by_size = table5.table("sciq")
    store(bench, by_size["small"], [1.0] * 20, sources="dddc")
    store(bench, by_size["medium"], [1.0] * 20, sources="ddcccccc")
    assert claims.difference(bench, by_size["small"], by_size["medium"], "share") == pytest.approx((50, 50, 50))
    claims.report(bench)
    rows = {row["claim"]: row["verdict"] for row in json.loads((bench.results / "claims.json").read_text())["rows"]}
    assert rows == {"medium data above small": "open", "medium data asks the device less than small": "held"}


def test_the_time_that_is_left_is_judged_by_what_was_measured(bench):
    todo = [Cell("sciq", "spa", Training("sciq")), Cell("sciq", "s1", Training("sciq")), Cell("xsum", "base")]
    assert run.estimate(bench, todo) is None
    for folder, name, content in (
        ("cells", "sciq-base", {"time/evaluate_seconds": 10}),
        ("cells", "xsum-base-one-shot", {"time/evaluate_seconds": 100}),
        ("trainings", "sciq-full-s2", {"time/train_seconds": 7}),
    ):
        (bench.results / folder).mkdir(parents=True, exist_ok=True)
        (bench.results / folder / f"{name}.json").write_text(json.dumps(content))
    assert run.estimate(bench, todo) == 7 + 10 + 10 + 100


def test_backbone_passes_are_counted_once_and_without_those_that_train_through(bench):
    """The chosen learning rate of a size has a file of its own beside the one by its rate."""
    (bench.results / "trainings").mkdir(parents=True)
    summary = {"epochs": 15, "data/train_examples": 100, "data/held_out_examples": 10, "data/backbone_passes": 110}
    summary["learning_rate"] = 5e-4
    for name in ("sciq-full-spa", "sciq-full-spa-0.0005", "sciq-full-lora-3epochs"):
        (bench.results / "trainings" / f"{name}.json").write_text(json.dumps(summary))
    assert run.backbone_passes(bench) == {"needed": 1500 + 170, "run": 110, "saved": 1560}


def test_cells_are_selected_by_a_regular_expression():
    cells = [Cell("xsum", "base"), Cell("xsum", "spa", Training("xsum")), Cell("sciq", "base", shots=1)]
    names = [cell.name for cell in run.select(cells, "xsum-(?!full)|one-shot$")]
    assert names == ["xsum-base", "sciq-base-one-shot"]
    assert run.select(cells, "") == cells
    with pytest.raises(UserError, match=r"--only='\*' is no regular expression: nothing to repeat"):
        run.select(cells, "*")


def test_entries_say_ours_the_interval_and_the_papers():
    assert Entry(1.234, (1.0, 2.0), 3.5).text() == "1.23 [1.00, 2.00] (3.5)"
    assert Entry(None, None, 3.5).text() == "- (3.5)"
    assert Entry(2.0).text(1) == "2.0"


def test_scales_are_found_by_name():
    assert find_scale("paper") is PAPER
    assert {field.name for field in dataclasses.fields(PAPER)} == {field.name for field in dataclasses.fields(MINI)}
    with pytest.raises(UserError, match="no scale 'huge'; scales are paper, mini"):
        find_scale("huge")


def test_a_damaged_result_is_named(bench):
    store(bench, Cell("sciq", "base"), [1.0])
    (bench.results / "cells" / "sciq-base.json").write_text("{")
    with pytest.raises(UserError, match=r"sciq-base\.json' is damaged .*delete it"):
        bench.result(Cell("sciq", "base"))


def committed():
    return sorted((RESULTS / "mini" / "predictions").glob("*.jsonl"))


@pytest.mark.skipif(not committed(), reason="no predictions are committed yet")
def test_committed_predictions_hold_no_more_than_they_may():
    for path in committed():
        first, *lines = path.read_text().splitlines()
        assert set(json.loads(first)["evaluation"]) == {
            "task", "split", "beams", "length_penalty", "shots", "setting", "threshold", "backbone", "plugin",
            "questions",
        }  # fmt: skip
        assert lines
        assert len({json.loads(line)["id"] for line in lines}) == len(lines)
        for line in lines:
            assert set(json.loads(line)) == {"id", "hash", "text", "sources", "scores"}
