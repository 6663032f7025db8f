"""Compiled programs on disk are found by the next process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import sys
import jax
from absl import flags
from spa_jax import compilation_cache
from spa_jax.errors import UserError
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
flags.FLAGS(sys.argv)
try:
    compilation_cache.keep_programs()
except UserError as error:
    sys.exit(f"refused: {error}")
jax.jit(lambda x: x * 2)(1.0)
print(len(hits))
"""


def compile_in_a_process(cache: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment = {**kept, "SPA_JAX_CACHE": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-c", COMPILE, *flags], env=environment, capture_output=True, text=True, check=False
    )


def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
    first, second = (compile_in_a_process(tmp_path) for _ in range(2))
    assert (first.stdout, int(second.stdout) > 0) == ("0\n", True)
    assert list(tmp_path.glob("compiled/*/*-cache"))


@pytest.mark.parametrize("choice", ["none", "named", "of JAX"])
def test_another_directory_or_none_can_be_chosen(tmp_path, choice):
    default, other = tmp_path / "default", tmp_path / "other"
    if choice == "of JAX":
        result = compile_in_a_process(default, JAX_COMPILATION_CACHE_DIR=str(other))
    else:
        result = compile_in_a_process(default, f"--compilation_cache={choice if choice == 'none' else other}")
    assert result.stdout == "0\n"
    assert not default.exists()
    assert bool(list(other.rglob("*-cache"))) == (choice != "none")


@pytest.mark.parametrize("is_named", [True, False])
def test_a_directory_that_cannot_be_written(tmp_path, is_named):
    """Is refused where it was named; otherwise programs are not kept."""
    file = tmp_path / "file"
    file.write_text("no directory")
    result = compile_in_a_process(file, *([f"--compilation_cache={file}"] if is_named else []))
    if is_named:
        assert "refused: --compilation_cache: " in result.stderr
        assert "cannot be written; name another directory, or none" in result.stderr
    else:
        assert result.stdout == "0\n"
        assert "Compiled programs are not kept" in result.stderr
