"""Whole training runs on a tiny backbone, in this process."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from spa_jax.data import pipeline
from spa_jax.errors import UserError
from spa_jax.models.plugin import init_plugin
from spa_jax.training import plugin_recipe, run
from spa_jax.training.step import train_step
from spa_jax.weights.plugin import load_plugin

TIMINGS = ("tokens/per_second", "time/train_seconds")


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def plugin_bytes(workdir: Path) -> bytes:
    return (workdir / "plugin" / "plugin.safetensors").read_bytes()


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


class Spy:
    """Watches the train step: the shapes it was given, what it compiled, and where to interrupt it."""

    def __init__(self, monkeypatch, interrupt_at: int | None = None) -> None:
        self.shapes: set[tuple] = set()
        train_step = run.train_step

        def spied(*arguments):
            *_, state, _, batch = arguments
            if int(state.step) == interrupt_at:
                raise KeyboardInterrupt
            self.shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(batch)))
            return train_step(*arguments)

        monkeypatch.setattr(run, "train_step", spied)


class Finished(NamedTuple):
    config: run.RunConfig
    workdir: Path
    summary: dict[str, float]
    frozen_before: dict
    frozen_after: dict


@pytest.fixture(scope="module")
def finished(tiny_overrides, make_config, tmp_path_factory) -> Finished:
    """A spa run of 36 steps with a checkpoint every four, and the backbone's bytes around it."""
    workdir = tmp_path_factory.mktemp("finished")
    config = make_config({"train.epochs": 12, "train.eval_every": 4, "train.log_every": 3})
    seen = []

    def load(*arguments):
        seen.append(run_load(*arguments))
        return seen[0]

    def frozen_bytes():
        return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), seen[0].params)

    run_load = run.load_backbone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_backbone", load)
        before = {}
        init = lambda *a, **k: (before.update(frozen_bytes()), init_plugin(*a, **k))[1]  # noqa: E731
        patch.setattr(plugin_recipe, "init_plugin", init)
        summary = run.train(config, workdir)
    return Finished(config, workdir, summary, before, frozen_bytes())


def test_the_backbones_bytes_stay_what_they_were(finished):
    assert len(jax.tree.leaves(finished.frozen_before)) == 12
    assert finished.frozen_after == finished.frozen_before


def test_a_checkpoint_holds_the_plugin_its_two_moments_and_counters_alone(finished):
    manager = ocp.CheckpointManager(finished.workdir / "checkpoints")
    step = manager.latest_step()
    assert step == 36
    saved = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    manager.close()
    plugin = load_plugin(finished.workdir / "plugin")
    expected = sorted(leaf.shape for leaf in jax.tree.leaves(init_plugin(plugin.config, abstract=True)))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(saved["params"])) == expected
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(saved)]
    assert sorted(array.shape for array in arrays if array.ndim) == sorted(3 * expected)
    assert all(array.dtype == np.int32 for array in arrays if not array.ndim)


def test_the_plugin_is_the_checkpoint_with_the_least_loss(finished):
    curve = {line["step"]: line["eval/loss/spa"] for line in read_metrics(finished.workdir) if "eval/loss/spa" in line}
    assert finished.summary["loss/spa"] == pytest.approx(min(curve.values()), rel=1e-6)
    kept = {int(path.name) for path in (finished.workdir / "checkpoints").iterdir()}
    assert kept == {36, min(curve, key=curve.get)}


def test_the_files_say_what_the_run_was(finished):
    described = json.loads((finished.workdir / "config.json").read_text())
    assert described["config"]["optimizer"]["learning_rate"] == 0.01
    assert described["config"]["data"]["date"] == "2024-07-26"
    assert json.loads((finished.workdir / "plugin" / "plugin_config.json").read_text())["date"] == "2024-07-26"
    assert described["versions"]["jax"] == jax.__version__
    assert len(described["backbone_fingerprint"]) == 32
    assert json.loads((finished.workdir / "summary.json").read_text()) == finished.summary
    wanted = {
        "loss/base",
        "loss/spa",
        "loss/always",
        "loss/oracle",
        "router/usage",
        "params/trainable_percent",
        *TIMINGS,
    }
    assert wanted <= set(finished.summary)
    steps = [(line["step"], "eval/loss/spa" in line) for line in read_metrics(finished.workdir)]
    assert sorted(steps) == sorted([(k, False) for k in range(3, 37, 3)] + [(k, True) for k in range(4, 37, 4)])


def test_the_same_run_again_changes_nothing(finished, monkeypatch):
    before = {path: path.read_bytes() for path in files_below(finished.workdir)}
    spy = Spy(monkeypatch)
    assert run.train(finished.config, finished.workdir) == finished.summary
    assert not spy.shapes
    assert {path: path.read_bytes() for path in files_below(finished.workdir)} == before


@pytest.mark.parametrize("stop", [12, 35])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(stop, finished, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        Spy(patch, interrupt_at=stop)
        with pytest.raises(KeyboardInterrupt):
            run.train(finished.config, tmp_path)
    run.train(finished.config, tmp_path)
    assert plugin_bytes(tmp_path) == plugin_bytes(finished.workdir)
    assert read_metrics(tmp_path) == read_metrics(finished.workdir)


@pytest.mark.parametrize("setting", ["spa", "s1", "s2", "s3"])
def test_twenty_answers_can_be_learnt(setting, finished, make_config, tmp_path):
    summary = finished.summary
    if setting != "spa":
        summary = run.train(make_config({"setting": setting, "train.epochs": 12, "train.eval_every": 36}), tmp_path)
    assert summary["loss/base"] > 5
    assert summary["loss/always"] < 0.5 * summary["loss/base"]
    assert summary[f"loss/{setting}"] < 0.5 * summary["loss/base"]


def test_the_step_compiles_once_per_bucket(make_config, tmp_path, monkeypatch):
    kinds = (("short", "yes"), ("short", "a long answer"), ("a question of some length, is it not?", "no"))
    rows = [{"source": source, "target": target} for source, target in kinds for _ in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data.train": str(path), "data.eval": str(path), "train.epochs": 3, "train.batch_size": 2}
    monkeypatch.setattr(pipeline, "WORTH_COMPILING", 0)
    spy, before = Spy(monkeypatch), train_step._cache_size()
    run.train(make_config(keys), tmp_path / "run")
    assert len(spy.shapes) == 2
    assert train_step._cache_size() == before + 2


def test_the_tap_cache_changes_no_loss(make_config, tmp_path):
    unused = tmp_path / "taps"
    off = {"train.log_every": 1, "tap_cache.enabled": False, "tap_cache.directory": str(unused)}
    run.train(make_config({"train.log_every": 1}), tmp_path / "on")
    run.train(make_config(off), tmp_path / "off")
    assert not unused.exists()
    on, off = read_metrics(tmp_path / "on"), read_metrics(tmp_path / "off")
    assert len(on) == 8
    assert on[-1]["eval/loss/always"] < on[0]["train/loss/always"] - 0.1
    for a, b in zip(on, off, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_run_in_bfloat16_learns_too(make_config, tmp_path):
    summary = run.train(make_config({"dtype": "bfloat16", "train.epochs": 6}), tmp_path)
    assert summary["loss/spa"] < summary["loss/base"] - 1
    params = load_plugin(tmp_path / "plugin").params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_no_number_stops_the_run_and_spoils_no_checkpoint(log_every, make_config, tmp_path):
    keys = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0, "train.log_every": log_every}
    with pytest.raises(UserError, match=r"no longer a number at step 2: lower optimizer.learning_rate"):
        run.train(make_config({**keys, "train.eval_every": 1}), tmp_path)
    assert all(math.isfinite(value) for line in read_metrics(tmp_path) for value in line.values())
    manager = ocp.CheckpointManager(tmp_path / "checkpoints")
    saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    manager.close()
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(saved["params"]))
    assert not (tmp_path / "plugin").exists()


REFUSED = {
    "limit": ({"tap_cache.limit_gib": 1e-9}, "tap_cache.limit_gib=1e-09"),
    "taps": ({"side.taps": "0,9"}, "side.taps"),
    "taps above the entry": ({"side.entry": "1", "side.taps": "0,2"}, "ascending indices up to 1 such as '0,1'"),
    "entry": ({"side.entry": "3", "side.taps": "0"}, "side.entry is '3': write 'middle', 'head', or the index of a"),
    "target": ({"data.max_length": 6}, "line 2: the target has 6 tokens"),
    "backbone": ({"backbone": "no/where/at/all"}, "no/where/at/all"),
    "persona": ({"data.train": ""}, "data.eval is set but data.train is not"),
    "held out": ({"data.eval": "", "data.eval_fraction": 0.01}, "too few to hold out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_and_leaves_no_file(case, make_config, tmp_path):
    keys, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        run.train(make_config({"tap_cache.directory": str(tmp_path / "taps"), **keys}), tmp_path / "run")
    assert files_below(tmp_path) == []


def test_a_workdir_of_an_impossible_name_is_refused_before_anything_is_read(make_config, tmp_path):
    with pytest.raises(UserError, match=r"cannot write the workdir 'n.*': File name too long"):
        run.train(make_config({"data.train": "nowhere"}), Path("n" * 300))


def refused_untouched(config: run.RunConfig, workdir: Path) -> str:
    """Returns the message with which a run in this workdir is refused, which changes no file."""
    before = {path: path.read_bytes() for path in files_below(workdir)}
    with pytest.raises(UserError) as refused:
        run.train(config, workdir)
    assert {path: path.read_bytes() for path in files_below(workdir)} == before
    return str(refused.value)


def test_the_workdir_of_another_config_is_refused(finished, make_config):
    config = make_config({"train.epochs": 12, "train.eval_every": 4, "train.log_every": 3, "setting": "s1"})
    message = refused_untouched(config, finished.workdir)
    assert "holds a run with another config (setting was 'spa', is now 's1'): choose another --workdir" in message


def test_the_workdir_of_another_backbone_is_refused(finished, monkeypatch):
    load = run.load_backbone
    monkeypatch.setattr(run, "load_backbone", lambda *a: dataclasses.replace(load(*a), fingerprint="another"))
    assert "holds a run on another backbone" in refused_untouched(finished.config, finished.workdir)


@pytest.mark.parametrize("change", [lambda a, b: (a[1:], b), lambda a, b: (a, [*b, b[0]]), lambda a, b: (a + b, [])])
def test_the_workdir_of_other_rows_is_refused(change, finished, monkeypatch):
    load = run.load_pairs
    monkeypatch.setattr(run, "load_pairs", lambda *a: change(*load(*a)))
    assert "holds a run on other data" in refused_untouched(finished.config, finished.workdir)


def test_a_run_from_before_inner_entries_goes_on_as_one_at_the_head(finished, make_config, tmp_path):
    shutil.copytree(finished.workdir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    later = "side.entry", "side.edits", "tap_cache.dtype", "router.labels", "data.date", "data.hub", "data.columns"
    for group, key in (name.split(".") for name in later):
        del described["config"][group][key]
    path.write_text(json.dumps(described))
    assert run.train(finished.config, tmp_path) == finished.summary
    keys = {"train.epochs": 12, "train.eval_every": 4, "train.log_every": 3, "side.taps": "0", "side.entry": "0"}
    message = refused_untouched(make_config(keys), tmp_path)
    assert "(side.edits was 'targets', is now 'all'; side.entry was 'head', is now '0'; side.taps was" in message


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_config_json_is_refused(content, finished, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json' is damaged"):
        run.train(finished.config, tmp_path)


def test_a_cached_shard_damaged_later_is_refused_by_name(make_config, tmp_path):
    config = make_config({"tap_cache.directory": str(tmp_path / "taps"), "train.epochs": 1})
    run.train(config, tmp_path / "one")
    [shard] = (tmp_path / "taps").rglob("*.arrayrecord")
    content = bytearray(shard.read_bytes())
    content[20_000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"'{shard}' is damaged: delete it"):
        run.train(config, tmp_path / "two")
