"""`python -m spa_jax.train` as its user meets it: ends well, is killed, is asked for the impossible."""

import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy

TIMINGS = ("tokens/per_second", "time/train_seconds")
TRAIN = "spa_jax.train"


def files_below(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_run(workdir, other):
    name = "plugin/plugin.safetensors"
    assert (workdir / name).read_bytes() == (other / name).read_bytes()
    assert metrics(workdir) == metrics(other)


def test_it_says_where_the_plugin_is_and_what_it_is_worth(trained):
    workdir, result = trained
    summary = json.loads((workdir / "summary.json").read_text())
    assert result.out.splitlines() == [
        f"plugin: {workdir}/plugin ({summary['params/trainable_percent']:.2f} % of the backbone's size)",
        f"held-out loss in nats per token: base {summary['loss/base']:.3f}, spa {summary['loss/spa']:.3f}",
        f"consulted share: {summary['router/usage']:.2f}",
    ]
    assert "20 training and 20 held-out examples" in result.err
    assert "step 72 of 72: held-out loss " in result.err


SIGNALLED = """
import logging
import signal

from configs import default


class Signaller(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("step {step} of "):
            signal.raise_signal(signal.{signal})


def get_config():
    logging.getLogger("spa_jax").addHandler(Signaller())
    return default.get_config()
"""
"""A config file whose run gets a signal when it has evaluated a step, while it may be writing the checkpoint before."""


def test_a_run_killed_twice_ends_as_an_unbroken_one(trained, long_run, command, training, tmp_path):
    workdir, config = tmp_path / "run", tmp_path / "killed.py"
    arguments = training(workdir, long_run | {"tap_cache.directory": tmp_path / "taps"})
    for step in (24, 56):
        config.write_text(SIGNALLED.format(step=step, signal="SIGKILL"))
        assert command(TRAIN, f"--config={config}", *arguments[1:]).status == -signal.SIGKILL
        assert metrics(workdir)[-1]["step"] == step
        kept = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
        assert kept in (step - 8, step - 16)
    result = command(TRAIN, *arguments)
    assert result.status == 0, result.err
    assert f"resuming at step {kept} of 72" in result.err
    assert_same_run(workdir, trained[0])


def test_the_same_command_after_the_end_changes_nothing(trained, long_run, command, training):
    workdir, first = trained
    before = {path: path.read_bytes() for path in files_below(workdir)}
    result = command(TRAIN, *training(workdir, long_run))
    assert (result.status, result.out) == (0, first.out)
    assert {path: path.read_bytes() for path in files_below(workdir)} == before


def test_an_interruption_is_no_error_and_keeps_the_checkpoint(command, training, tmp_path):
    config = tmp_path / "interrupted.py"
    config.write_text(SIGNALLED.format(step=6, signal="SIGINT"))
    result = command(TRAIN, f"--config={config}", *training(tmp_path, {"train.epochs": 1000})[1:])
    assert result.status == 130
    assert result.err.splitlines()[-1] == "interrupted: the same command goes on"
    assert "3" in (kept := [path.name for path in (tmp_path / "checkpoints").iterdir()])
    assert all(name.isdigit() for name in kept)
    assert not (tmp_path / "plugin").exists()


def test_a_loss_that_is_no_number_is_one_message(command_here, training, tmp_path):
    keys = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0, "train.eval_every": 1}
    result = command_here(TRAIN, *training(tmp_path, keys))
    result.assert_refused("no longer a number at step 2: lower optimizer.learning_rate")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


GOOD = '{"source": "a", "target": "b"}\n'
ROWS = {
    "empty": ("", "has no rows"),
    "no JSON": (GOOD + "\n" + GOOD[:-4] + "\n", "rows.jsonl, line 3 is not JSON"),
    "no object": (GOOD + "[1]\n", "rows.jsonl, line 2 is not a JSON object"),
    "no column": (GOOD + '{"source": "a", "answer": "b"}\n', "rows.jsonl, line 2: column 'target' is missing"),
    "empty target": ('{"source": "a", "target": " "}\n', "rows.jsonl, line 1: column 'target' is missing, empty"),
    "long target": (GOOD + GOOD.replace("b", "b" * 200), "rows.jsonl, line 2: the target has 201 tokens"),
    "no text": (b"\xff\xfe\x00", "cannot read the data file"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_named_with_their_line(case, command_here, training, tmp_path):
    content, message = ROWS[case]
    rows, workdir = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_bytes(content if isinstance(content, bytes) else content.encode())
    command_here(TRAIN, *training(workdir, {"data.train": rows})).assert_refused(message)
    assert not workdir.exists()


KEYS = {
    "no such file": ({"data.train": "gone.jsonl"}, "cannot read the data file 'gone.jsonl'"),
    "unknown key": ({"learning_rate": 1}, "no such key: learning_rate"),
    "unknown inner key": ({"optimizer.rate": 1}, "no such key: rate"),
    "unknown setting": ({"setting": "s4"}, "config key setting is 's4'; choices are 'spa', 's1', 's2', 's3'"),
    "wrong type": ({"train.epochs": "many"}, "--config.train.epochs=many: invalid literal for int()"),
    "out of range": ({"train.epochs": 0}, "config values out of range: train.epochs"),
    "no backbone": ({"backbone": "no-such-model"}, "There is no backbone 'no-such-model'"),
    "cache in a file": ({"tap_cache.directory": "pyproject.toml"}, "cannot write the tap cache 'pyproject.toml/"),
    "cache too small": ({"tap_cache.limit_gib": 1e-9, "side.taps": "0,1"}, "limit tap_cache.limit_gib=1e-09"),
}


@pytest.mark.parametrize("case", KEYS)
def test_bad_keys_are_named(case, command_here, training, tmp_path):
    keys, message = KEYS[case]
    command_here(TRAIN, *training(tmp_path / "run", keys)).assert_refused(message)
    assert not (tmp_path / "run").exists()


CONFIGS = {
    "unknown key": ("config.optimizer.rate = 1", "unknown config key optimizer.rate; keys here"),
    "lost key": ("del config.router", "config key router is missing"),
    "syntax": ("config.", "SyntaxError: invalid syntax (config.py, line 4)"),
    "exception": ("config.seed = 1 / 0", "ZeroDivisionError: division by zero"),
    "no config": ("return 3", "its get_config() returns no ConfigDict"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config_files_are_refused(case, command_here, tmp_path):
    line, message = CONFIGS[case]
    file = tmp_path / "config.py"
    lines = ["from configs import default", "def get_config():", "  config = default.get_config()", f"  {line}"]
    file.write_text("\n".join([*lines, "  return config"]))
    command_here(TRAIN, f"--config={file}", f"--workdir={tmp_path}/run").assert_refused(message)
    assert not (tmp_path / "run").exists()


NO_FILE = "cannot read the config: [Errno 2] No such file or directory: 'gone.py'; the files in configs/ are found from"
FLAGS = {
    "no config": (["--workdir=RUN"], "both --config=FILE and --workdir=DIR are needed"),
    "no workdir": (["--config=configs/default.py"], "both --config=FILE and --workdir=DIR are needed"),
    "empty workdir": (["--config=configs/default.py", "--workdir="], "both --config=FILE and --workdir=DIR are needed"),
    "no such config": (["--config=gone.py", "--workdir=RUN"], NO_FILE),
    "no such config with a key": (["--config=gone.py", "--workdir=RUN", "--config.seed=3"], NO_FILE),
    "a directory": (["--config=configs", "--workdir=RUN", "--config.seed=3"], "Is a directory: 'configs'"),
    "argument": (["--config=configs/default.py:x", "--workdir=RUN"], "get_config() takes 0 positional arguments"),
    "unknown flag": (["--config=configs/default.py", "--workdir=RUN", "--sed=1"], "Unknown command line flag 'sed'"),
    "no flag": (["--config=configs/default.py", "--workdir=RUN", "seed=1"], "unexpected argument 'seed=1'"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_are_named(case, command_here, tmp_path):
    arguments, message = FLAGS[case]
    command_here(TRAIN, *(a.replace("RUN", f"{tmp_path}/run") for a in arguments)).assert_refused(message)
    assert not (tmp_path / "run").exists()


def truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reweighed(change):
    def spoil(directory):
        path = directory / "model.safetensors"
        weights = safetensors.numpy.load_file(path)
        change(weights)
        safetensors.numpy.save_file(weights, path)

    return spoil


BACKBONES = {
    "truncated": (truncated, "model.safetensors is corrupt or truncated"),
    "weight lost": (reweighed(lambda w: w.pop("model.norm.weight")), "missing: model.norm.weight"),
    "weight more": (reweighed(lambda w: w.update(extra=np.zeros(3, np.float32))), "unknown: extra"),
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), "has no tokenizer.json"),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_bad_backbones_are_refused(case, command_here, training, tiny_backbone_directory, tmp_path):
    spoil, message = BACKBONES[case]
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_backbone_directory, backbone)
    spoil(backbone)
    command_here(TRAIN, *training(tmp_path / "run", {"backbone": backbone})).assert_refused(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_place_of_the_workdir_is_left_alone(place, command_here, training, tmp_path):
    (tmp_path / "file").write_text("mine")
    command_here(TRAIN, *training(tmp_path / place)).assert_refused("cannot write ")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_workdir_of_another_config_is_left_alone(trained, long_run, command_here, training):
    before = {path: path.read_bytes() for path in files_below(trained[0])}
    result = command_here(TRAIN, *training(trained[0], long_run | {"train.epochs": 25}))
    result.assert_refused("holds a run with another config (train.epochs was 24, is now 25): choose another --workdir")
    assert {path: path.read_bytes() for path in files_below(trained[0])} == before


def test_a_damaged_checkpoint_is_one_message(trained, long_run, command_here, training, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    for path in files_below(workdir / "checkpoints" / "72" / "state"):
        path.write_bytes(b"\0" * 10)
    result = command_here(TRAIN, *training(workdir, long_run))
    result.assert_refused(f"cannot restore the checkpoint '{workdir}/checkpoints/72'")


def test_processes_that_cannot_meet_are_told_what_to_give(command_here, tmp_path):
    config = ["--config=configs/quickstart.py", "--config.distributed.enabled=True"]
    command_here("spa_jax.train", *config, f"--workdir={tmp_path}").assert_refused("distributed.coordinator=HOST:PORT")
