"""Table 2's times: by which programs, over how many exchanges, and without a training where none is needed."""

import pytest

from experiments.paper import table2
from experiments.paper.store import CellStore
from spa_jax.models.plugin import count_params
from spa_jax.split.simulated import Network


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(table2, "TOKENS", 6)
    monkeypatch.setattr(table2, "QUESTIONS", 2)


@pytest.mark.parametrize(("name", "ratio"), [("LoRA", 3), ("Adapter", 6), ("LST", 1)])
def test_what_does_not_depend_on_a_training_is_timed_without_one(tiny_store, monkeypatch, name, ratio):
    monkeypatch.setattr(CellStore, "train", lambda *_: pytest.fail("trained"))
    found = table2.latency(tiny_store, name)
    assert found["ratio"] == ratio
    network = Network()
    exchanges = ratio * table2.TOKENS
    sent = found["bytes"] * 8 / network.down
    assert found["network_seconds"] == pytest.approx(exchanges * network.tau + sent, rel=1e-6)
    assert (found["opening_seconds"] > 0) == (name != "LST")
    assert found["total_seconds"] == found["inference_seconds"] + found["network_seconds"]
    assert len(set(found["prompt_tokens"])) == 1 <= found["prompt_tokens"][0] <= 64
    monkeypatch.setattr(table2, "questions", lambda *_: pytest.fail("measured again"))
    assert table2.latency(tiny_store, name) == found


def test_how_often_spa_asks_is_what_it_has_learned_and_an_untrained_method_has_its_size(tiny_store):
    found = table2.latency(tiny_store, "SPA")
    assert 0 <= found["ratio"] <= 1
    training = table2.methods(tiny_store.scale, "xsum")["SPA"].training
    assert (tiny_store.results / "trainings" / f"{training.label}.json").exists()
    fresh = table2.untrained(tiny_store.config(training), tiny_store.backbone, "chat")
    assert count_params(fresh.params) == tiny_store.summary(training)["params/trainable"]


def test_a_row_has_the_papers_times_and_what_is_there_of_ours(tiny_store, keep_record, monkeypatch):
    monkeypatch.setattr(tiny_store, "may_run", False)
    keep_record(tiny_store, "latency", "s3", {"network_seconds": 0.25, "ratio": 1.0})
    rows = {}
    monkeypatch.setattr(table2, "write", lambda store, name, module, title, found, notes: rows.update(found))
    table2.report(tiny_store)
    assert list(rows["LST"]) == ["% param", "inference s", "opening s", "network s", "total s", "ratio", "XSum"]
    assert rows["LST"]["network s"] == (0.25, None, 0.31)
    assert rows["LoRA"]["XSum"] == (None, None, 38.24)
