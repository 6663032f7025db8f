"""Eight devices compute what one does, hold what the table says, and never fetch a whole backbone at once."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from spa_jax.training import run

BLOCKS = 5


def call(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@functools.cache
def reports_of(*meshes):
    done = call("tests.training.eight_devices", *meshes)
    assert "Involuntary full rematerialization" not in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["2x2x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8x1x1", "2x4x1", "1x1x8"))])
def mesh(request):
    return request.param


@pytest.fixture
def report(mesh):
    return reports_of("2x2x2")[mesh] if mesh == "2x2x2" else reports_of("8x1x1", "2x4x1", "1x1x8")[mesh]


def test_training_evaluation_and_decoding_agree_with_one_device(report):
    assert len(report["differences"]) == 16
    assert max(report["differences"].values()) < 1e-5, report["differences"]


def test_parameters_and_what_a_step_returns_lie_where_the_table_says(report):
    assert report["misplaced"] == []


def test_the_cache_is_split_by_rows_and_heads(report, mesh):
    data, fsdp, tensor = map(int, mesh.split("x"))
    rows, blocks, heads, width, slots = report["cache"]
    split = heads // tensor if heads >= tensor else heads
    assert report["cache_part"] == [rows // (data * fsdp), blocks, split, width, slots]


def test_a_step_fetches_a_backbone_by_the_block(report, mesh):
    split = int(mesh.split("x")[1]) > 1
    blocks = [shape for shape in report["gathered"] if 64 in shape and shape[0] != BLOCKS]
    assert [shape for shape in report["gathered"] if shape[:1] == [BLOCKS]] == []
    assert bool(blocks) == split


def test_a_step_returns_nothing_of_the_backbone(report):
    assert report["state"] <= report["outputs"] < report["state"] + 100  # and a few sums


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_a_run_moves_from_eight_devices_to_one(cached, make_config, tiny_overrides, tmp_path):
    """Interrupted there and resumed here, it ends as if it had always been here."""
    keys = {"train.epochs": 2, "train.eval_every": 3, "tap_cache.enabled": cached, "train.batch_size": 8}
    keys |= {"tap_cache.directory": str(tmp_path / "taps")}
    here = run.train(make_config(keys), tmp_path / "here")
    there = json.dumps({**tiny_overrides, **keys, "mesh.data": 2, "mesh.fsdp": 4})
    call("tests.training.interrupted_on_eight", str(tmp_path / "moved"), there)
    lines = [json.loads(line) for line in (tmp_path / "moved/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    moved = run.train(make_config(keys), tmp_path / "moved")
    losses = [name for name in here if name.startswith("loss/")]
    assert len(losses) == 4
    assert {name: moved[name] for name in losses} == pytest.approx({name: here[name] for name in losses}, rel=1e-5)
