"""Seconds of `python -m spa_jax.generate` with nothing compiled on disk, and of the same command once more.

    python -m experiments.benchmarks.second_start

SmolLM2 in float32 with a random plugin at the default entry that corrects the prompt, one program, `NEW` tokens. The
whole process counts, from its start to its end. Each pair begins with an empty `--compilation_cache`; the medians of
`--repeats` pairs count.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments.benchmarks.output import write_result
from experiments.benchmarks.timing import BACKBONE, make_plugin
from experiments.record import print_table
from spa_jax import command
from spa_jax.models.plugin import parse_entry
from spa_jax.weights.registry import load_backbone

REPEATS = flags.DEFINE_integer("repeats", 3, "Pairs that count.", lower_bound=1)
NEW = 16


def seconds_of_generate(plugin: Path, programs: Path) -> float:
    """Runs the command to its end."""
    command_line = [
        sys.executable, "-m", "spa_jax.generate", f"--plugin={plugin}", "--prompt=What is my name?",
        f"--max_new_tokens={NEW}", f"--compilation_cache={programs}",
    ]  # fmt: skip
    caching = ("JAX_COMPILATION_CACHE", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(caching)}
    began = time.perf_counter()
    subprocess.run(command_line, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def measure(plugin: Path) -> dict[str, list[float]]:
    """Returns the seconds of first runs, and of second ones."""
    found: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(REPEATS.value):
        with tempfile.TemporaryDirectory() as programs:
            for seconds in found.values():
                seconds.append(seconds_of_generate(plugin, Path(programs)))
    return found


def main() -> None:
    backbone = load_backbone(BACKBONE)
    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder) / "plugin"
        make_plugin(backbone, parse_entry("middle", backbone.config), "all").save(plugin)
        found = measure(plugin)
    medians = {run: statistics.median(seconds) for run, seconds in found.items()}
    share = medians["second"] / medians["first"]
    rows = [(run, f"{medians[run]:.2f}", f"{min(found[run]):.2f}", f"{max(found[run]):.2f}") for run in found]
    print_table(("run", "seconds", "fastest", "slowest"), rows)
    print(f"the second run takes {share:.2f} of the first one's time")
    write_result("second_start", {"new": NEW, "seconds": found, "median_seconds": medians, "share": share})


if __name__ == "__main__":
    command.run(main)
