"""Every benchmark can be started: each is a command with flags of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

import experiments.benchmarks

FOLDER = Path(experiments.benchmarks.__file__).parent
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if "command.run(main" in path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_says_what_its_flags_are(name):
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert "--helpfull" in done.stdout, done.stderr
