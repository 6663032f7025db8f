"""Devices to compile for, which this machine need not have."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from spa_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The capacity of one chip.

    Attributes:
        memory: GiB that the TPU compiler lets a program use.
        flops: peak bfloat16 operations a second, in units of 1e12, as the maker states.
        bandwidth: peak memory bandwidth in units of 1e9 bytes a second, as the maker states.
    """

    memory: float
    flops: float
    bandwidth: float


CHIPS = {
    "v4": Chip(30.75, 275, 1228), "v5e": Chip(15.75, 197, 819), "v5p": Chip(95.74, 459, 2765),
    "v6e": Chip(31.25, 918, 1640),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a program is compiled for.

    Attributes:
        devices: one device for each chip.
        memory: bytes of a chip that a program may use.
        chip: the chip's capacity; None if it is not in `CHIPS`.
    """

    devices: Sequence[Any]
    memory: int
    chip: Chip | None = None

    def seconds(self, flops: float, moved: float) -> float | None:
        """Returns a lower bound of a chip's seconds for so many operations and bytes of memory, without exchanges."""
        return max(flops / (1e12 * self.chip.flops), moved / (1e9 * self.chip.bandwidth)) if self.chip else None


def find_target(name: str, slices: int = 1) -> Target:
    """Finds the devices of a topology.

    Args:
        name: a TPU topology such as `v5e:2x4` or `v5p:4x4x4`, which needs the TPU compiler but no TPU; `cpu` or `gpu`
            for this machine's devices.
        slices: number of TPU slices of this topology.

    Raises:
        UserError: there is no such topology, no such device, or no TPU compiler.
    """
    chip, _, layout = name.partition(":")
    if chip in CHIPS:
        jax.config.update("jax_platforms", "cpu")
        return Target(_tpu(chip, layout, slices), int(CHIPS[chip].memory * GIB), CHIPS[chip])
    if name not in ("cpu", "gpu"):
        raise UserError(f"there is no topology '{name}': give cpu, gpu, or one such as v5e:2x4 of {', '.join(CHIPS)}")
    try:
        devices = jax.devices(name)
    except RuntimeError as error:
        raise UserError(f"this machine has no {name} that JAX can use: {error}") from error
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    else:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    return Target(devices, memory)


def _tpu(chip: str, layout: str, slices: int) -> Sequence[Any]:
    # Without these variables the compiler would ask this machine for its TPUs.
    known = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in (known | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as the other generations have it
    sizes = [int(size) for size in layout.split("x") if size.isdecimal()]
    if sizes and math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(f"{chip}:{layout}", platform="tpu", **options).devices
    except Exception as error:  # of several types, some with a page of text
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot compile for '{chip}:{layout}' ({reason}): give one that exists, and install the TPU compiler "
            "in an environment of its own with pip install 'spa_jax[tpu]'"
        ) from error
