"""The machine that a measurement is made on, in words."""

import os
import platform
from pathlib import Path

import jax


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
