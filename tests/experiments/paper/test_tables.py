"""Tables from stored cells alone."""

import json

import pytest

from experiments.paper import ablations, tables
from experiments.paper import store as store_module
from experiments.paper.cells import spa_cell
from experiments.paper.scales import CLOSED_BOOK, MINI, PAPER, TASKS
from spa_jax.errors import UserError


def rows_of_table(store, name):
    tables.TABLES[name].write(store, name)
    return json.loads((store.results / f"{name}.json").read_text())["rows"]


def test_a_table_needs_no_model_and_shows_what_is_not_done(store, keep_cell, monkeypatch):
    monkeypatch.setattr(store_module, "load_backbone", lambda *_: pytest.fail("a model was loaded"))
    keep_cell(store, spa_cell(MINI, "sciq"), [10.0, 20.0, 60.0])
    rows = rows_of_table(store, "table1")
    assert rows["SPA"]["SciQ"]["ours"] == pytest.approx(30.0)
    low, high = rows["SPA"]["SciQ"]["interval"]
    assert 10 <= low < 30 < high <= 60
    assert rows["SPA"]["SciQ"]["paper"] == 25.38
    assert rows["SPA"]["XSum"]["ours"] is None
    assert rows["SPA, transformer"].keys() == {"SciQ"}
    lines = (store.results / "table1.md").read_text().splitlines()
    assert any(line.startswith("| SPA | - (35.52) | - (39.22) | - (37.3) | 30.00 [") for line in lines)
    assert f"Scale: {MINI.caption}" in lines
    said = "`python -m experiments.paper.tables table1 --scale=mini`; what it ran on."  # and not this machine
    assert lines[2] == said
    assert (store.results / "table1.png").stat().st_size > 1000


def test_shares_are_of_generated_tokens_and_their_mean_waits_for_all_four(store, keep_cell):
    for task in ("xsum", "cnn_dailymail", "coqa"):
        for cell in (spa_cell(MINI, task), tables.sizes(MINI, task)["SPA full"]):
            keep_cell(store, cell, [1.0, 2.0], sources="ddcc")
        record = json.loads((store.results / "cells" / f"{task}-full-spa.json").read_text())
        assert "consulted_share" not in record  # it is counted from the predictions
    rows = rows_of_table(store, "table7")["SPA full"]
    assert rows["XSum"]["ours"] == 50
    assert rows["mean of the four"] == {"ours": None, "interval": None, "paper": 61.8}
    for cell in (spa_cell(MINI, "sciq"), tables.sizes(MINI, "sciq")["SPA full"]):
        keep_cell(store, cell, [1.0, 2.0], sources="ddddc")
    assert rows_of_table(store, "table7")["SPA full"]["mean of the four"]["ours"] == pytest.approx((50 * 3 + 80) / 4)
    rows = rows_of_table(store, "table3")
    assert rows["SPA"]["XSum share"]["ours"] == 0.5
    assert rows["SPA"]["mean share"]["ours"] == pytest.approx((0.5 * 3 + 0.8) / 4)
    assert rows["S1"]["mean share"]["ours"] is None


def test_what_a_training_says_of_itself_stands_beside_its_cell(store, keep_cell, keep_record):
    cell = spa_cell(MINI, "xsum")
    keep_cell(store, cell, [1.0])
    summary = {"params/trainable_percent": 0.25, "data/train_questions": 525}
    keep_record(store, "trainings", cell.training.label, {"description": cell.training.description, **summary})
    rows = rows_of_table(store, "table4")
    assert rows["paper (LLaMA-7B)"]["M"] == {"ours": None, "interval": None, "paper": 0.62}
    assert (rows["XSum"]["% param"]["ours"], rows["XSum"]["M"]["ours"]) == (0.25, None)
    largest = tables.sizes(MINI, "xsum")["SPA full"].training
    keep_record(store, "trainings", largest.label, {"description": largest.description, **summary})
    rows = rows_of_table(store, "table5")
    assert rows["SPA full"]["XSum"] == {"ours": 525, "interval": None, "paper": 227_000}
    assert rows["SPA small"]["SciQ"]["paper"] == 5_000


def test_all_metrics_of_a_size_stand_in_one_row(store, keep_cell, keep_record):
    cell = tables.sizes(MINI, "sciq")["SPA small"]
    keep_cell(store, cell, [1.0, 2.0], sources="dc")
    record = {"description": cell.description, "loss/base": 4.5, "nats": [1.25, 1.0, 1.5]}
    keep_record(store, "cells", cell.label, record)
    training = {"description": cell.training.description, "data/train_questions": 1097, "epochs": 2}
    keep_record(store, "trainings", cell.training.label, training)
    row = rows_of_table(store, "sizes")["SciQ, SPA small"]
    assert [entry["ours"] for entry in row.values()] == [1097, 2, 4.5, 1.25, 1.5, None, 50]
    text = (store.results / "sizes.md").read_text()
    assert "| SciQ, SPA small | 1097 | 2 | 4.500 | 1.250 [1.000, 1.500] | 1.50 [1.00, 2.00] | - | 50.00 [" in text
    assert f"\n{MINI.by_size_caption}\n" in text
    assert "| XSum, SPA small | - | - | - |" in text


def test_sizes_of_the_closed_book_and_of_the_other_table_are_in_front_of_the_lm_head():
    assert tables.sizes(MINI, CLOSED_BOOK) == tables.head_sizes(MINI, CLOSED_BOOK)
    entries = {cell.training.changes.get("side.entry") for cell in tables.sizes(MINI, "sciq").values()}
    assert entries == {MINI.plugin["side.entry"]}
    assert tables.head_sizes(MINI, "sciq")["SPA full"] == spa_cell(MINI, "sciq")


def test_entries_show_the_loss_of_each_cells_own_setting_and_are_of_one_protocol(store, keep_cell):
    found = tables.entries(MINI, "sciq")
    keep_cell(store, found["SPA at 0.62, inner"], [1.0, 2.0], sources="ddcc")
    cell = store.results / "cells" / f"{found['SPA at 0.62, inner'].label}.json"
    cell.write_text(json.dumps({**json.loads(cell.read_text()), "loss/spa": 1.5, "loss/s1": 0.5}))
    rows = rows_of_table(store, "entries_sciq")
    assert rows["SPA at 0.62, inner"]["nats"]["ours"] == 1.5
    assert rows["SPA at 0.62, inner"]["share"]["ours"] == 0.5
    same = ("data.size", "data.max_length", "train.epochs")
    trainings = [cell.training.changes for row, cell in found.items() if row != "one-shot"]
    assert len({tuple(changes[key] for key in same) for changes in trainings}) == 1
    seeds = [found[row].training.changes.get("seed", 0) for row in found if row.startswith(tables.AT_INNER)]
    assert seeds == [0, 1, 2]
    taught = found["SPA with router.labels=router, inner"].training
    assert dict(taught.changes) == {**found[tables.INNER].training.changes, "router.labels": "router"}


def test_figure_4_has_a_point_for_every_number_of_epochs(store, keep_cell):
    for cell in tables.epochs(MINI, "xsum", tables.PARALLEL).values():
        keep_cell(store, cell, [1.0, 3.0])
    rows = rows_of_table(store, "figure4")
    assert [entry["ours"] for entry in rows["XSum, parallel (S1)"].values()] == [2.0] * 5
    assert [entry["ours"] for entry in rows["SciQ, sequential (S3)"].values()] == [None] * 5
    assert (store.results / "figure4.png").stat().st_size > 1000


def test_an_ablation_says_which_protocol_it_is_and_what_was_decayed(store, keep_record):
    cell = ablations.cells(MINI, "sciq")["spa offset seed 1"]
    record = {"description": cell.training.description, "params/trainable": 300_000, "note": "with decay."}
    keep_record(store, "trainings", cell.training.label, record | {"hardware": "another machine"})
    keep_record(store, "cells", cell.label, {"description": cell.description, "loss/base": 4.51, "loss/at 0.62": 2.0})
    rows = rows_of_table(store, "ablation_sciq")
    assert rows["spa offset seed 1"]["loss/at 0.62"]["ours"] == 2.0
    text = (store.results / "ablation_sciq.md").read_text()
    assert "| spa offset seed 1 | 300000 | 4.510 | - |" in text
    for said in ("320 tokens", "8 epochs", "another protocol, 384 tokens, 15 epochs", "another machine."):
        assert said in text
    assert "\nspa offset seed 1: with decay.\n" in text
    assert MINI.caption not in text


def test_a_scale_without_ablations_has_no_table_of_them(tmp_path):
    store = store_module.CellStore(PAPER, "", tmp_path, tmp_path, run=False)
    tables.TABLES["ablation_sciq"].write(store, "ablation_sciq")
    assert list(tmp_path.rglob("*.json")) == []


def test_tables_are_written_by_name(monkeypatch):
    with pytest.raises(UserError, match="there is no table 'table2'; tables are table1, table3, "):
        tables.main(["table1", "table2"])
    written = []
    monkeypatch.setattr(tables, "open_store", lambda: None)
    monkeypatch.setattr(tables.Table, "write", lambda self, store, name: written.append(name))
    tables.main(["table7", "figure4"])
    assert written == ["table7", "figure4"]
    tables.main([])
    assert written[2:] == list(tables.TABLES)


@pytest.mark.parametrize("name", ["table1", "table3", "table6"])
def test_the_papers_numbers_are_those_of_its_tasks(name):
    (column, *_) = tables.TABLES[name].columns
    assert all(len(numbers) == len(TASKS) for numbers in column.paper.values())
    assert column.paper.keys() <= tables.TABLES[name].grid(MINI).keys()
