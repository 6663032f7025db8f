"""Commands in processes of their own and in the tests' process, and a finished training run for them to work on."""

import contextlib
import io
import json
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import rich
from absl import flags

from spa_jax import compilation_cache
from spa_jax.command import run as run_command
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.weights.huggingface import load_directory
from spa_jax.weights.plugin import Plugin

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    status: int
    out: str
    err: str

    def assert_refused(self, message: str) -> None:
        """One line that says `error:`, the last one, and no traceback."""
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        assert message in lines[-1]
        assert "Traceback" not in self.err
        assert self.out == ""
        assert self.status == 2


class Running(NamedTuple):
    pid: int
    wait: Callable[[], Result]


Start = Callable[..., Running]
Run = Callable[..., Result]


@pytest.fixture(scope="session")
def environment(compilation_cache, tmp_path_factory) -> dict[str, str]:
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "SPA_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.fixture(scope="session")
def start(environment, tmp_path_factory) -> Iterator[Start]:
    """Starts `python -m MODULE ARGUMENTS...` with a text on its standard input."""
    program = [sys.executable, Path(__file__).with_name("starter.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment) as starter:

        def start_one(module: str, *arguments: str, stdin: str = "") -> Running:
            folder = tmp_path_factory.mktemp("command")
            (folder / "stdin").write_text(stdin, errors="surrogateescape")
            request = {"module": module, "arguments": arguments, "folder": str(folder)}
            starter.stdin.write(json.dumps(request) + "\n")
            starter.stdin.flush()
            pid = int(starter.stdout.readline())

            def wait() -> Result:
                status = int(starter.stdout.readline())
                return Result(status, *((folder / name).read_text() for name in ("stdout", "stderr")))

            return Running(pid, wait)

        yield start_one
        starter.stdin.close()


@pytest.fixture(scope="session")
def command(start) -> Run:
    """The same, to its end."""
    return lambda *arguments, **keywords: start(*arguments, **keywords).wait()


def take_flags() -> list[tuple[str, flags.Flag]]:
    """Takes the flags of commands, which one process cannot all have, and of configs away from absl, each with the name
    of its module."""
    # A module that is run has its path for a name, and keys of configs are defined by the last one.
    ours = ("spa_jax.", "experiments.", "ml_collections.", str(ROOT), "absl.flags._flag")
    defined, shared = flags.FLAGS.flags_by_module_dict().items(), compilation_cache.__name__
    taken = [(module, flag) for module, some in defined if module.startswith(ours) for flag in some if module != shared]
    for name in {flag.name for _, flag in taken}:
        delattr(flags.FLAGS, name)
    return taken


@contextlib.contextmanager
def fresh_flags() -> Iterator[None]:
    """Flags as a process begins with them; those of modules that tests have imported come back."""
    kept = take_flags()
    try:
        yield
    finally:
        take_flags()
        for module, flag in kept:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


@contextlib.contextmanager
def fresh_logs() -> Iterator[None]:
    """Logs without handlers, and a console as before when the command has ended."""
    logs = [logging.getLogger(), logging.getLogger("spa_jax")]
    kept = [(log.level, log.handlers, log.propagate) for log in logs]
    for log in logs:
        log.handlers = []
    try:
        yield
    finally:
        for log, (level, handlers, propagate) in zip(logs, kept):
            log.level, log.handlers, log.propagate = level, handlers, propagate
        rich.reconfigure()


@pytest.fixture(scope="session")
def opening_plugin(tiny_backbone_directory, tmp_path_factory) -> Path:
    """A random plugin that enters in front of the last block, and corrects the prompt too."""
    backbone = load_directory(tiny_backbone_directory)
    config = PluginConfig("s1", SideConfig("tokenwise", 6, (0, 2)), 32, entry=2, edits="all")
    rng, shapes = np.random.default_rng(3), init_plugin(config, abstract=True)
    params = jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("opening") / "plugin"
    Plugin(config, params, str(tiny_backbone_directory), backbone.fingerprint, "chat").save(path)
    return path


@pytest.fixture
def command_here(environment, monkeypatch) -> Run:
    """Runs a command to its end as `command` does, but in this process: the cheap way to see what is refused."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SPA_JAX_CACHE", environment["SPA_JAX_CACHE"])

    def run(module: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        for name in list(sys.modules):  # whatever defines flags or reads them; aot imports train
            if name in (module, "spa_jax.train", "spa_jax.answer_flags") or name.startswith("spa_jax.serve."):
                monkeypatch.delitem(sys.modules, name)
        out, err = io.StringIO(), io.StringIO()
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with fresh_flags(), fresh_logs(), streams[0], streams[1], pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        return Result(ended.value.code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def on_terminal(monkeypatch) -> Callable[..., tuple[bytes, bytes]]:
    """Runs a command's `main` with standard streams of an encoding, and returns what it wrote to output and error."""

    def run(main: Callable[[], None], typed: bytes = b"", encoding: str = "utf-8") -> tuple[bytes, bytes]:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        streams["stderr"].reconfigure(errors="backslashreplace")  # as Python itself does
        streams["stdin"] = io.TextIOWrapper(io.BytesIO(typed), encoding)
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["command"])
        with fresh_flags(), fresh_logs(), pytest.raises(SystemExit) as ended:
            run_command(main)
        assert not ended.value.code
        for name in ("stdout", "stderr"):
            streams[name].flush()
        return streams["stdout"].buffer.getvalue(), streams["stderr"].buffer.getvalue()

    return run


@pytest.fixture(scope="session")
def training(tiny_overrides) -> Callable[..., list[str]]:
    """Arguments of `spa_jax.train` for a tiny run, with some keys set."""

    def arguments(workdir: Path, keys: dict[str, Any] | None = None) -> list[str]:
        values = tiny_overrides | (keys or {})
        overrides = (f"--config.{key}={value}" for key, value in values.items())
        return ["--config=configs/default.py", f"--workdir={workdir}", *overrides]

    return arguments


@pytest.fixture(scope="session")
def long_run() -> dict[str, int]:
    """Steps enough to learn the rows by heart."""
    return {"train.epochs": 24, "train.eval_every": 8}


@pytest.fixture(scope="session")
def trained(training, long_run, environment, tmp_path_factory) -> tuple[Path, Result]:
    """Workdir of a run of 72 steps, by the real command, and what it printed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    arguments = training(workdir, long_run)
    done = subprocess.run(
        [sys.executable, "-m", "spa_jax.train", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workdir, Result(done.returncode, done.stdout, done.stderr)
