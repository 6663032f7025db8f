"""The flag of benchmarks that says where their result goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments.record import write_record

OUTPUT = flags.DEFINE_string("output", "", "Where to write the result; experiments/results/NAME.json by default.")


def output_path(name: str) -> Path:
    """Returns where the result of this benchmark goes."""
    return Path(OUTPUT.value or f"experiments/results/{name}.json")


def write_result(name: str, found: Mapping[str, Any], arguments: str = "", threads: int = 0) -> None:
    """Writes the result of a benchmark.

    Args:
        name: of its module.
        found: JSON types.
        arguments: flags with which it was run.
        threads: to which it was kept; 0 for all.
    """
    write_record(output_path(name), f"benchmarks.{name} {arguments}".strip(), found, threads)
