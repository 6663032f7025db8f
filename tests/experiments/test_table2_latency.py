"""Table 2's times: by which programs, over how many exchanges, and without a training where none is needed."""

import dataclasses
import json

import pytest

from experiments import table2
from experiments.cells import Bench
from experiments.scales import MINI
from spa_jax.models.plugin import count_params
from spa_jax.split.simulated import Network


@pytest.fixture
def bench(tmp_path, tiny_backbone_directory, monkeypatch):
    """Of a LLaMA of three blocks, and ten articles."""
    (tmp_path / "data" / "xsum").mkdir(parents=True)
    rows = [{"document": f"Article {i} says so.", "summary": "So.", "id": str(i)} for i in range(10)]
    for split in ("train", "validation", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / "xsum" / f"{split}.jsonl").write_text(text)
    monkeypatch.setenv("SPA_JAX_CACHE", str(tmp_path / "cache"))  # of taps
    scale = dataclasses.replace(
        MINI,
        backbone=str(tiny_backbone_directory),
        through_epochs={"xsum": 1},
        through_length=64,
        sizes={"xsum": dict.fromkeys(("small", "medium", "full"), "full")},
        through_rates=None,
    )
    return Bench(scale, str(tmp_path / "data"), tmp_path / "runs", tmp_path / "results")


@pytest.mark.parametrize(("name", "ratio"), [("LoRA", 3), ("Adapter", 6), ("LST", 1)])
def test_what_does_not_depend_on_a_training_is_timed_without_one(bench, monkeypatch, name, ratio):
    monkeypatch.setattr(Bench, "train", lambda *_: pytest.fail("trained"))
    found = table2.latency(bench, name)
    assert found["ratio"] == ratio
    network = Network()
    exchanges = ratio * table2.TOKENS
    sent = found["bytes"] * 8 / network.down
    assert found["network_seconds"] == pytest.approx(exchanges * network.tau + sent, rel=0.05)  # and the opening
    assert found["total_seconds"] == found["inference_seconds"] + found["network_seconds"]
    assert len(set(found["prompt_tokens"])) == 1 <= found["prompt_tokens"][0] <= 64
    monkeypatch.setattr(table2, "questions", lambda *_: pytest.fail("measured again"))
    assert table2.latency(bench, name) == found


def test_how_often_spa_asks_is_what_it_has_learned(bench):
    found = table2.latency(bench, "SPA")
    assert 0 <= found["ratio"] <= 1
    assert (bench.results / "trainings" / "xsum-full-spa-short-1epochs.json").exists()


def test_an_untrained_method_has_the_size_of_the_trained_one(bench):
    training = table2.table("xsum", bench.scale)["LST"].training
    assert training is not None
    plugin = table2.untrained(bench.config(training, 1e-3), bench.backbone, "chat")
    assert count_params(plugin.params) == bench.summary(training)["params/trainable"]
