"""Table 2's times: by which programs, over how many exchanges, and without a training where none is needed."""

import dataclasses
import json

import pytest

from experiments.paper import table2
from experiments.paper.scales import MINI
from experiments.paper.store import CellStore
from spa_jax.models.plugin import count_params
from spa_jax.split.simulated import Network


@pytest.fixture
def store(tmp_path, tiny_backbone_directory, monkeypatch):
    """Of a LLaMA of three blocks, and ten articles."""
    (tmp_path / "data" / "xsum").mkdir(parents=True)
    rows = [{"document": f"Article {i} says so.", "summary": "So.", "id": str(i)} for i in range(10)]
    for split in ("train", "validation", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / "xsum" / f"{split}.jsonl").write_text(text)
    monkeypatch.setenv("SPA_JAX_CACHE", str(tmp_path / "cache"))  # of taps
    scale = dataclasses.replace(
        MINI,
        config={**MINI.config, "backbone": str(tiny_backbone_directory)},
        table2_epochs={"xsum": 1},
        table2_config={"data.max_length": 64},
        sizes={"xsum": dict.fromkeys(("small", "medium", "full"), "full")},
        table2_tuned_on=None,
    )
    return CellStore(scale, str(tmp_path / "data"), tmp_path / "runs", tmp_path / "results")


@pytest.mark.parametrize(("name", "ratio"), [("LoRA", 3), ("Adapter", 6), ("LST", 1)])
def test_what_does_not_depend_on_a_training_is_timed_without_one(store, monkeypatch, name, ratio):
    monkeypatch.setattr(CellStore, "train", lambda *_: pytest.fail("trained"))
    found = table2.latency(store, name)
    assert found["ratio"] == ratio
    network = Network()
    exchanges = ratio * table2.TOKENS
    sent = found["bytes"] * 8 / network.down
    assert found["network_seconds"] == pytest.approx(exchanges * network.tau + sent, rel=0.05)  # and the opening
    assert found["total_seconds"] == found["inference_seconds"] + found["network_seconds"]
    assert len(set(found["prompt_tokens"])) == 1 <= found["prompt_tokens"][0] <= 64
    monkeypatch.setattr(table2, "questions", lambda *_: pytest.fail("measured again"))
    assert table2.latency(store, name) == found


def test_how_often_spa_asks_is_what_it_has_learned(store):
    found = table2.latency(store, "SPA")
    assert 0 <= found["ratio"] <= 1
    assert (store.results / "trainings" / "xsum-full-spa-short-1epochs.json").exists()


def test_an_untrained_method_has_the_size_of_the_trained_one(store):
    training = table2.methods(store.scale, "xsum")["LST"].training
    assert training is not None
    plugin = table2.untrained(store.config(training, 1e-3), store.backbone, "chat")
    assert count_params(plugin.params) == store.summary(training)["params/trainable"]
