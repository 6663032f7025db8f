"""Records of measurements: what was run on which machine, and what was found."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from spa_jax.files import write_json


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> None:
    """Prints rows of cells under the titles of their columns, by default as wide as the terminal is."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def write_record(path: Path, module: str, found: Mapping[str, Any], threads: int = 0) -> None:
    """Writes what a command found, after the command and the machine that it ran on.

    Args:
        path: of a JSON file.
        module: the command after `python -m experiments.`, with its flags.
        found: JSON types.
        threads: to which it was kept; 0 for all.
    """
    machine = hardware() + (f", {threads} threads" if threads else "")
    write_json(path, {"command": f"python -m experiments.{module}", "hardware": machine, **found})


def hardware() -> str:
    """Names the processor, its cores and JAX's devices, such as `2 CPU cores (AMD EPYC, AVX2), cpu`."""
    device = jax.devices()[0]
    devices = "cpu" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"
    return f"{os.cpu_count()} CPU cores ({_processor()}), {devices}"


def _processor() -> str:
    """Returns the processor's name where Linux knows it, with its vector unit, which decides what a core can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    described = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    vector_units = {"avx512f": "AVX-512", "avx2": "AVX2"}
    flags = described.get("flags", "").split()
    found = [vector_units[flag] for flag in vector_units if flag in flags]
    return ", ".join([described.get("model name", platform.machine()), *found[:1]])
