"""Stores of cells: one that may run nothing, and finished cells with chosen scores."""

import dataclasses
import gzip
import json

import pytest
from flax.core import FrozenDict

from experiments.paper.cells import plugin_training, short_training
from experiments.paper.scales import MINI, SIZES
from experiments.paper.store import CellStore
from spa_jax.scoring.predictions import Prediction


@pytest.fixture
def store(tmp_path):
    """A store of the mini scale that may not run anything."""
    return CellStore(MINI, "", tmp_path / "runs", tmp_path / "results", run=False)


@pytest.fixture
def running_store(tmp_path):
    """The same, but it may."""
    return CellStore(MINI, "", tmp_path / "runs", tmp_path / "results")


@pytest.fixture(scope="session")
def keep_record():
    """Writes a record as a store keeps it."""

    def keep(store, folder, label, content):
        path = store.results / folder / f"{label}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    return keep


@pytest.fixture(scope="session")
def keep_cell(keep_record):
    """Keeps a finished cell with these ROUGE-L scores, all of the same sources."""

    def keep(store, cell, scores, sources="cd"):
        rows = [Prediction(str(i), "0" * 16, "text", sources, {"rougeL": s}) for i, s in enumerate(scores, start=1)]
        lines = [json.dumps({"evaluation": {"task": cell.task}}), *(json.dumps(vars(row)) for row in rows)]
        path = store.results / "predictions" / f"{cell.label}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode()))
        record = {"cell": cell.label, "description": cell.description, "hardware": "what it ran on", "loss/base": 4.0}
        keep_record(store, "cells", cell.label, record)

    return keep


@pytest.fixture(scope="session")
def tiny_store(make_backbone_directory, tmp_path_factory, keep_record):
    """A store that trains on a LLaMA of three blocks over bytes, with a few rows of XSum and SciQ."""
    root = tmp_path_factory.mktemp("store")
    rows = {
        "xsum": lambda i: {"document": f"Article {i} says so.", "summary": "So.", "id": str(i)},
        "sciq": lambda i: {"question": f"What is {i}?", "correct_answer": "abc"[i % 3], "support": "It is so."},
    }
    for task, row in rows.items():
        (root / "data" / task).mkdir(parents=True)
        text = "".join(json.dumps(row(i)) + "\n" for i in range(10))
        for split in ("train", "validation", "test"):
            (root / "data" / task / f"{split}.jsonl").write_text(text)
    config = {**MINI.config, "backbone": str(make_backbone_directory()), "side.width": 8, "train.epochs": 1}
    scale = dataclasses.replace(
        MINI,
        config={**config, "tap_cache.directory": str(root / "taps")},
        sizes={task: dict.fromkeys(SIZES, "full") for task in rows},
        table2=("xsum",),
        short={"xsum": FrozenDict({"data.max_length": 64, "train.epochs": 1})},
        short_tuned_on=None,
        ablations={"sciq": {"data.max_length": 64, "train.epochs": 1}},
    )
    store = CellStore(scale, str(root / "data"), root / "runs", root / "results")
    for training in (plugin_training(scale, "xsum"), short_training(scale, "xsum", "spa")):
        keep_record(store, "rates", training.tuned_on.label, {"held_out_loss": {"0.001": 1.0}})
    return store
