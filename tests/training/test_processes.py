"""Several processes train as one: they agree with one, and go on after one or all of them are gone."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from spa_jax.training import run

KEYS = {"train.epochs": 40, "train.eval_every": 6, "train.log_every": 1, "optimizer.learning_rate": 1e-3}
PREEMPTED = 75


@pytest.fixture
def start(tiny_overrides, free_port, tmp_path):
    """Starts `python -m spa_jax.train` in several processes."""
    started = []

    def run_all(name, count, keys):
        together = {
            "enabled": True,
            "coordinator": f"127.0.0.1:{free_port()}",
            "processes": count,
            "heartbeat_seconds": 30,
        }
        given = {**tiny_overrides, **keys, **{f"distributed.{key}": value for key, value in together.items()}}
        flags = [f"--config.{key}={value}" for key, value in given.items()]
        command = [sys.executable, "-m", "spa_jax.train", "--config=configs/default.py", f"--workdir={tmp_path / name}"]
        for process in range(count):
            log = (tmp_path / f"{name}-{process}.log").open("a+")
            done = subprocess.Popen(
                [*command, *flags, f"--config.distributed.process={process}"], stdout=log, stderr=log,
                cwd=Path(__file__).parents[2], start_new_session=True,
            )  # fmt: skip
            started.append(done)
            done.said = lambda file=log: (file.seek(0), file.read())[1]
        return started[-count:]

    yield run_all
    for process in started:
        process.kill()
        process.wait()


def ended(processes):
    """Their exit statuses."""
    return [process.wait(timeout=1500) for process in processes]


def wait_for_step(workdir, step, processes):
    """Until there is its checkpoint or a later one, in whose favour it may be gone."""
    until = time.monotonic() + 1500
    while not any(int(path.name) >= step for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()):
        assert time.monotonic() < until, "it takes too long"
        assert all(p.poll() is None for p in processes), processes[0].said()[-4000:]
        time.sleep(0.02)


def losses(workdir):
    """By step; each step once."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["train/loss/spa"] for line in lines if "train/loss/spa" in line}
    assert len(found) == sum("train/loss/spa" in line for line in lines)
    return found


def parameters(workdir):
    return safetensors.numpy.load_file(workdir / "plugin" / "plugin.safetensors")


def assert_close(one, other):
    assert losses(one) == pytest.approx(losses(other), rel=1e-5, abs=1e-6)
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4, err_msg=name)


def assert_same(one, other):
    assert losses(one) == losses(other)
    a, b = parameters(one), parameters(other)
    assert all(np.array_equal(a[name], b[name]) for name in a.keys() | b.keys())


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(cached, start, make_config, tmp_path):
    keys = {"train.epochs": 2, "train.log_every": 1, "tap_cache.enabled": cached}
    keys["tap_cache.directory"] = str(tmp_path / "taps")
    both = start("both", 2, keys)
    assert ended(both) == [0, 0], both[0].said()[-4000:] + both[1].said()[-4000:]
    if cached:
        shards = list((tmp_path / "taps").rglob("*.arrayrecord"))
        assert len(shards) == 2, "each has computed its rows, and only those"
    run.train(make_config(keys | {"tap_cache.directory": str(tmp_path / "alone")}), tmp_path / "one")
    assert_close(tmp_path / "both", tmp_path / "one")


@pytest.mark.slow
def test_a_notice_to_one_saves_and_ends_both_and_one_alone_goes_on(start, make_config, tmp_path):
    both = start("moved", 2, KEYS)
    wait_for_step(tmp_path / "moved", 12, both)
    both[1].send_signal(signal.SIGTERM)
    assert ended(both) == [PREEMPTED, PREEMPTED], both[0].said()[-4000:]
    assert all("preempted after step" in process.said() for process in both)
    last = max(losses(tmp_path / "moved"))
    assert 12 <= last < 120
    assert (tmp_path / "moved" / "checkpoints" / str(last)).is_dir()
    run.train(make_config(KEYS), tmp_path / "moved")
    run.train(make_config(KEYS), tmp_path / "one")
    assert_close(tmp_path / "moved", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_are_killed_go_on_bit_for_bit(count, start, make_config, tmp_path):
    """First one of them, which ends the others, then all of them."""
    through = start("through", count, KEYS)
    assert ended(through) == [0] * count, through[0].said()[-4000:]
    for step, victims in ((18, slice(1, 2)), (48, slice(None))):
        killed = start("killed", count, KEYS)
        wait_for_step(tmp_path / "killed", step, killed)
        for process in killed[victims]:
            process.kill()
        assert all(status != 0 for status in ended(killed))
    assert max(losses(tmp_path / "killed")) < 120
    again = start("killed", count, KEYS)
    assert ended(again) == [0] * count, again[0].said()[-4000:]
    assert_same(tmp_path / "killed", tmp_path / "through")
    run.train(make_config(KEYS), tmp_path / "one")
    assert_close(tmp_path / "killed", tmp_path / "one")
