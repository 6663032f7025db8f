"""Stores of cells: one that may run nothing, and finished cells with chosen scores."""

import gzip
import json

import pytest

from experiments.paper.scales import MINI
from experiments.paper.store import CellStore
from spa_jax.scoring.predictions import Prediction


@pytest.fixture
def store(tmp_path):
    """Of the mini scale; it may not run anything."""
    return CellStore(MINI, "", tmp_path / "runs", tmp_path / "results", run=False)


@pytest.fixture
def running_store(tmp_path):
    """The same, and it may."""
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
