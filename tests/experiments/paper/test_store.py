"""Cells that are done once, trainings whose learning rate is chosen once, and records that are of what they say."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from flax.core import FrozenDict

from experiments.paper import ablations, run, search
from experiments.paper import store as store_module
from experiments.paper.cells import Cell, cell_of, plugin_training, short_training, size_training, spa_cell
from experiments.paper.scales import MINI
from experiments.paper.store import CellStore
from spa_jax.errors import UserError
from spa_jax.scoring.predictions import read_predictions

RESULTS = Path(__file__).parents[3] / "experiments" / "results"
BASE = Cell("sciq-base", "sciq", None, FrozenDict(setting="base"))


def test_a_finished_cell_is_not_run_again_and_an_unfinished_one_is(store, running_store, keep_cell, monkeypatch):
    ran = []

    def evaluate(self, cell):
        ran.append(cell.label)
        keep_cell(self, cell, [5.0])

    monkeypatch.setattr(CellStore, "_evaluate", evaluate)
    assert store.result(BASE) is None
    assert not store.done(BASE)
    made = running_store.result(BASE)
    assert made == running_store.result(BASE)
    assert store.done(BASE)
    kept = store.result(BASE)
    assert made == kept
    assert (kept["score/rougeL"][0], kept["loss/base"]) == (5.0, 4.0)
    assert ran == ["sciq-base"]


def test_a_cell_is_bootstrapped_once(store, keep_cell, monkeypatch):
    keep_cell(store, BASE, [5.0])
    store.result(BASE)
    monkeypatch.setattr(store_module, "summarize", lambda *_: pytest.fail("again"))
    assert store.result(BASE)["score/rougeL"][0] == 5.0


def test_what_a_cell_measured_is_kept_and_found_again(running_store, store, monkeypatch):
    said = b'{"evaluation": {}}\n{"id": "1", "hash": "", "text": "a", "sources": "d", "scores": {"rougeL": 7.0}}\n'

    def evaluate(config, backbone, plugin, output, prompts):
        assert (config.task, config.setting, config.shots, config.beams) == ("sciq", "base", 0, 4)
        assert plugin is None
        output.mkdir(parents=True)
        (output / "predictions.jsonl").write_bytes(said)
        scores = {"score/rougeL": [7.00001, -np.inf, np.inf], "consulted_share": 1.0}  # the file's are rounded
        return {"loss/base": 3.0, "nats": [3.0, 2.5, 3.5], **scores}

    monkeypatch.setattr(store_module, "evaluate", evaluate)
    monkeypatch.setattr(CellStore, "backbone", None)
    found, kept = running_store.result(BASE), store.result(BASE)
    assert found == kept
    assert found["score/rougeL"] == [7.0, -np.inf, np.inf]
    assert {"cell", "loss/base", "nats", "score/rougeL", "consulted_share", "share", "hardware"} <= set(found)
    record = json.loads((store.results / "cells" / "sciq-base.json").read_text())
    assert record["description"] == BASE.description
    assert not any(key.startswith("score/") for key in record)
    packed = (store.results / "predictions" / "sciq-base.jsonl.gz").read_bytes()
    assert packed[4:8] == bytes(4), "a time in the file, which would make it another one every time"


def test_a_record_of_something_else_is_refused(store, keep_cell, keep_record):
    keep_cell(store, BASE, [1.0])
    with pytest.raises(UserError, match=r"sciq-base\.json' is of another changes than asked for: delete it"):
        store.result(dataclasses.replace(BASE, changes=FrozenDict(setting="base", shots=1)))
    training = plugin_training(MINI, "sciq")
    keep_record(store, "trainings", training.label, {"description": training.description})
    assert store.summary(training) is not None
    other = dataclasses.replace(training, changes=FrozenDict({**training.changes, "router.offset": True}))
    with pytest.raises(UserError, match=r"sciq-full-spa\.json' is of another changes"):
        store.summary(other)


def test_a_cell_of_before_there_were_descriptions_stays_finished(store, keep_cell):
    keep_cell(store, BASE, [5.0])
    path = store.results / "cells" / "sciq-base.json"
    record = json.loads(path.read_text())
    del record["description"]
    path.write_text(json.dumps(record))
    packed = store.results / "predictions" / "sciq-base.jsonl.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert store.result(BASE)["score/rougeL"][0] == 5.0
    assert run.estimate(store, [BASE]) is None


def test_a_damaged_result_is_named(store, keep_cell):
    keep_cell(store, BASE, [1.0])
    packed = store.results / "predictions" / "sciq-base.jsonl.gz"
    whole = packed.read_bytes()
    for damaged in (whole[:-9], whole[:20], b"{"):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"sciq-base\.jsonl\.gz' is no predictions file"):
            store.result(BASE)
    (store.results / "cells" / "sciq-base.json").write_text("{")
    with pytest.raises(UserError, match=r"sciq-base\.json' is damaged .*delete it"):
        store.result(BASE)


def test_the_learning_rate_is_chosen_once_on_the_medium_size_by_held_out_loss(running_store, monkeypatch):
    ran = []

    def train(config, _):
        ran.append((config.data.size, config.optimizer.learning_rate))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {"loss/spa": abs(config.optimizer.learning_rate - 5e-4) + 1}

    monkeypatch.setattr(store_module, "train", train)
    monkeypatch.setattr(CellStore, "backbone", property(lambda _: pytest.fail("no need of a model")))
    whole = plugin_training(MINI, "sciq")
    assert list(running_store.missing_runs(whole)) == [
        "sciq-full-spa", "sciq-medium-spa-0.0002", "sciq-medium-spa-0.0005", "sciq-medium-spa-0.001",
    ]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        running_store.train(whole)
    assert ran == [("250", 2e-4), ("250", 5e-4), ("250", 1e-3)]
    assert list(running_store.missing_runs(whole)) == ["sciq-full-spa", "sciq-medium-spa-0.001"]
    for size in ("full", "small", "medium"):
        running_store.train(plugin_training(MINI, "sciq", size=size))
    assert ran[3:] == [("250", 1e-3), ("full", 5e-4), ("60", 5e-4), ("250", 5e-4)]  # the two that were done are kept
    assert running_store.missing_runs(whole) == {}
    chosen = json.loads((running_store.results / "rates" / "sciq-medium-spa.json").read_text())
    assert min(chosen["held_out_loss"], key=chosen["held_out_loss"].get) == "0.0005"
    record = json.loads((running_store.results / "trainings" / "sciq-full-spa.json").read_text())
    assert (record["learning_rate"], record["run"]) == (5e-4, "sciq-full-spa-0.0005")
    assert running_store.summary(whole) == record


def test_a_config_is_the_scales_with_what_the_training_changes(running_store, monkeypatch):
    monkeypatch.setattr(CellStore, "backbone", property(lambda _: pytest.fail("no need of a model")))
    config = running_store.config(short_training(MINI, "xsum", "spa"), 2e-4)
    assert (config.backbone, config.data.task, config.data.max_length) == ("smollm2-135m-instruct", "xsum", 256)
    assert (config.train.epochs, config.train.batch_size, config.optimizer.learning_rate) == (3, 8, 2e-4)
    assert running_store.config(plugin_training(MINI, "xsum")).train.epochs == 15


def test_a_training_on_more_rows_is_tested_on_more_rows_and_others_see_none_of_them(tmp_path, monkeypatch):
    row = {"question": "What?", "support": "It is so.", "correct_answer": "this"}
    (tmp_path / "sciq").mkdir()
    for name in ("train", "train_more", "validation", "test", "test_more"):
        (tmp_path / "sciq" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    store = CellStore(MINI, str(tmp_path), tmp_path / "runs", tmp_path / "results")
    read = {}

    def evaluate(config, backbone, plugin, output, prompts):
        read[Path(config.data)] = [len(config.read(split)) for split in ("train", "validation", "test")]
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "evaluate", evaluate)
    monkeypatch.setattr(store_module, "load_trained", lambda _: None)
    monkeypatch.setattr(CellStore, "train", lambda self, training: Path(self.config(training).data.directory))
    monkeypatch.setattr(CellStore, "_loaded", lambda *_: (None, None))
    more, own = size_training(MINI, "sciq", "full"), plugin_training(MINI, "sciq")
    for training in (more, own):
        with pytest.raises(KeyboardInterrupt):
            store.result(cell_of(training))
    assert read == {store.train(more): [2, 1, 2], store.train(own): [1, 1, 1]}
    assert store.train(own) == tmp_path / "sciq"
    assert CellStore(MINI, "", tmp_path, tmp_path).directory("sciq", more=True) == ""


def test_the_share_has_an_interval_and_the_loss_where_it_was_kept(store, keep_cell, keep_record):
    keep_cell(store, BASE, [1.0, 2.0, 3.0], sources="dddc")
    assert store.result(BASE)["share"] == [75, 75, 75]
    assert store.result(BASE)["nats"] == store.result(BASE)["loss/base"] == 4.0
    other = dataclasses.replace(BASE, label="other")
    keep_cell(store, other, [1.0], sources="cc")
    keep_record(store, "cells", "other", {"description": other.description, "loss/base": 4.0, "nats": [4.0, 3.5, 4.5]})
    assert store.result(other)["nats"] == [4.0, 3.5, 4.5]


def test_machines_are_those_of_the_folder_and_notes_those_of_the_rows(store, keep_record):
    offset, plain = plugin_training(MINI, "sciq", offset=True), plugin_training(MINI, "sciq")
    ablation = ablations.training(MINI, "sciq", "s3")
    for training, machine, note in ((offset, "one", {"note": "N."}), (plain, "two", {}), (ablation, "three", {})):
        record = {"description": training.description, "hardware": machine, **note}
        keep_record(store, "trainings", training.label, record)
    assert store.hardware() == "one; two"
    assert store.hardware(ablations.FOLDER) == "three"
    cells = [("a", cell_of(offset)), ("b", cell_of(offset, budget=0.62)), ("c", cell_of(plain)), ("d", None)]
    assert store.notes([*cells, ("e", spa_cell(MINI, "xsum"))]) == ["a, b: N."]


KEPT = CellStore(MINI, "", Path("none"), RESULTS, run=False)


def test_every_kept_record_is_of_a_cell_or_training_of_today():
    cells = run.all_cells(MINI)
    trainings = {*(cell.training for cell in cells if cell.training), *search.trainings(MINI)}
    tried = {label for training in trainings if training.tuned_on for label in store_module.trials(training.tuned_on)}
    for cell in cells:
        assert not KEPT.done(cell) or KEPT.record(cell)["cell"] == cell.label
    for training in trainings:
        record = KEPT.summary(training) or {}
        assert ("note" in record) == bool(record and training.changes.get("router.offset"))
    known = {"cells": {cell.label for cell in cells}, "trainings": {training.label for training in trainings} | tried}
    for folder, labels in known.items():
        root = KEPT.results / folder
        assert {str(path.relative_to(root)).removesuffix(".json") for path in root.rglob("*.json")} <= labels


def test_kept_predictions_hold_no_more_than_they_may():
    paths = sorted((KEPT.results / "predictions").iterdir())
    assert paths
    for path in paths:
        identity, rows = read_predictions(path)
        assert set(identity) - {"entry", "edits"} == {  # of an inner entry
            "task", "split", "beams", "length_penalty", "shots", "setting", "threshold", "backbone", "plugin",
            "questions",
        }  # fmt: skip
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
        assert len(rows) == len(lines) > 0
        kept = {"id", "hash", "text", "sources", "scores"}
        assert all(set(json.loads(line)) in (kept, kept | {"pieces"}) for line in lines)
