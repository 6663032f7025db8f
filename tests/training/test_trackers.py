"""Trackers beside metrics.jsonl: TensorBoard's files by its own reader, and Weights & Biases without a network."""

import json
import time
from unittest import mock

import pytest

from spa_jax.errors import UserError
from spa_jax.training import run, trackers
from spa_jax.training.config import RunConfig

METRICS = {"eval/loss/spa": 1.25, "tokens/per_second": 800.0}


def tensorboard_scalars(workdir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(workdir / "tensorboard")).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def wandb_text(workdir):
    """All that W&B has put down for `wandb sync`: protocol buffers, whose strings stand in the file as they are."""
    return b"".join(path.read_bytes() for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")))


def test_tensorboard_reads_what_was_written_and_forgets_the_steps_that_are_repeated(tmp_path):
    pytest.importorskip("tensorboardX")
    first = trackers.TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, METRICS)
    first.close()
    resumed = trackers.TensorBoard(tmp_path, 1)
    resumed.write(2, {"eval/loss/spa": 0.5})
    resumed.close()
    found = tensorboard_scalars(tmp_path)
    assert found["tokens/per_second"] == {1: 800.0}
    assert found["eval/loss/spa"] == {1: 1.25, 2: 0.5}


def test_weights_and_biases_has_one_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        tracker = trackers.WeightsAndBiases(tmp_path, RunConfig())
        tracker.write(step, {f"eval/loss/step{step}": 1.25})
        tracker.close()
        time.sleep(1.1)  # wandb names directories by the second
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{run_id}.wandb"}
    text = wandb_text(tmp_path)
    for said in (b"eval/loss/step1", b"eval/loss/step2", b"1.25", b"learning_rate", trackers.WANDB_PROJECT.encode()):
        assert said in text


def test_a_run_tells_its_trackers_what_its_file_says(make_config, tmp_path):
    pytest.importorskip("tensorboardX")
    run.train(make_config({"train.epochs": 1, "train.log_every": 1}), tmp_path, ["tensorboard", "tensorboard"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected: dict[str, dict[int, float]] = {}
    for line in lines:
        for name in line.keys() - {"step"}:
            expected.setdefault(name, {})[line["step"]] = pytest.approx(line[name], rel=1e-6)
    assert tensorboard_scalars(tmp_path) == expected
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_tracker_that_cannot_be_opened_is_named_before_the_run(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no tracker 'mlflow'; trackers are tensorboard, wandb"):
        trackers.check_trackers(["mlflow"], tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'wandb' needs wandb: pip install 'spa_jax\[trackers\]'"):
        run.train(RunConfig(), tmp_path / "run", ["wandb"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000])
def test_a_damaged_id_of_weights_and_biases_is_named(content, tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "wandb.json").write_text(content)
    with pytest.raises(UserError, match=r"wandb\.json' is damaged \(.*\): delete it"):
        trackers.WeightsAndBiases(tmp_path, RunConfig())


def test_a_file_in_place_of_a_trackers_directory_is_named(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"cannot write '.*tensorboard': Not a directory"):
        trackers.open_trackers(["tensorboard"], tmp_path, RunConfig(), 0)


def test_a_refusal_of_weights_and_biases_says_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    # What it raises without a key, of WANDB_MODE=sometimes, and where its directory is a file.
    refusals = (wandb.errors.UsageError("No\nkey"), ValueError("No\nkey"), NotADirectoryError("No key"))
    for refusal in refusals:
        monkeypatch.setattr(wandb, "init", mock.Mock(side_effect=refusal))
        with pytest.raises(UserError, match="wandb: No key; log in with `wandb login`, or set WANDB_MODE=offline"):
            trackers.WeightsAndBiases(tmp_path, RunConfig())
