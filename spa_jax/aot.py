"""Compiles a config's programs for devices that need not be there, and prints what they take.

    python -m spa_jax.aot --config=configs/paper/xsum.py --topology=v5e:2x4 [--program=cloud] [--output=FILE]

Exit status 1 says that a program does not fit a chip's memory. TPU topologies need the TPU compiler, in an environment
of its own (pip install 'spa_jax[tpu]'), and no TPU.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, cast, get_args

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from spa_jax import command
from spa_jax.choices import CODECS, Codec
from spa_jax.compiling.programs import Compiled, ProgramName, Sizes, compile_programs
from spa_jax.compiling.topology import GIB, Target, find_target
from spa_jax.decoding.encoders import row_length
from spa_jax.files import write_json
from spa_jax.train import read_config
from spa_jax.training.sharding import AXES, MeshPartitioner, make_mesh

flags.declare_key_flag("config")  # of spa_jax.train; --help shows it
TOPOLOGY = flags.DEFINE_string("topology", "cpu", "TPU topology such as v5e:2x4, or cpu or gpu for what is here.")
PROGRAM = flags.DEFINE_enum(
    "program", "train", get_args(ProgramName), "What to compile; each is counted for one run on one chip."
)
OUTPUT = flags.DEFINE_string("output", None, "File for the report as JSON.")
ROWS = flags.DEFINE_integer("rows", 0, "Prompts at once; by default train.batch_size.", lower_bound=0)
LENGTH = flags.DEFINE_integer("length", 0, "Tokens of a row or prompt; by default as the config says.", lower_bound=0)
TARGETS = flags.DEFINE_integer("targets", 0, "train: target tokens of a row; by default all of them.", lower_bound=0)
ROOM = flags.DEFINE_integer("room", 128, "cloud, device: most new tokens.", lower_bound=1)
CODEC = flags.DEFINE_enum("codec", "bfloat16", CODECS, "cloud, device: how taps and corrections travel.")


def report(programs: list[Compiled], target: Target) -> dict[str, Any]:
    """Sums up the programs: the most memory that any of them takes, and the work of one run of each."""
    peaks = [program.peak_bytes for program in programs if program.peak_bytes is not None]
    peak = max(peaks, default=None)
    costs = [program.cost for program in programs if program.cost is not None]
    fits = all(program.fits for program in programs) and peak is not None and peak <= target.memory
    seconds = [target.seconds(cost.flops, cost.bytes) for cost in costs]
    return {
        "fits": fits,
        "peak_bytes_per_chip": peak,
        "chip_bytes": target.memory,
        "flops_per_chip": sum(cost.flops for cost in costs),
        "bytes_per_chip": sum(cost.bytes for cost in costs),
        "collective_bytes_per_chip": sum(sum(cost.collectives.values()) for cost in costs),
        "seconds_at_least": None if None in seconds else sum(filter(None, seconds)),
        "compile_seconds": sum(program.seconds for program in programs),
        "programs": [dataclasses.asdict(program) for program in programs],
    }


def show(programs: list[Compiled]) -> None:
    """Prints a table of the programs."""
    table = Table("program", "arguments", "temporaries", "peak", "TFLOP", "GiB moved", "GiB exchanged", "compiled in")
    for program in programs:
        sizes = (program.argument_bytes, program.temporary_bytes, program.peak_bytes)
        memory = ["?" if size is None else f"{size / GIB:.2f} GiB" for size in sizes]
        work = ["-"] * 3
        if program.cost is not None:
            kinds = program.cost.collectives.items()
            exchanged = "\n".join(f"{kind} {size / GIB:.3f}" for kind, size in sorted(kinds)) or "none"
            work = [f"{program.cost.flops / 1e12:.3f}", f"{program.cost.bytes / GIB:.1f}", exchanged]
        table.add_row(program.name, *memory, *work, f"{program.seconds:.0f} s")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    config = read_config()
    jax.config.update("jax_enable_compilation_cache", False)  # or the time to compile would be one to read
    target = find_target(TOPOLOGY.value, max(config.mesh.slices, 1))
    rows = ROWS.value or config.train.batch_size
    partitioner = MeshPartitioner(make_mesh(config.mesh, rows // config.train.accumulate, target.devices))
    length = LENGTH.value or row_length(config.data.task, config.data.max_length)
    sizes = Sizes(rows, length, TARGETS.value or length, ROOM.value)
    which = cast(ProgramName, PROGRAM.value)
    programs = list(compile_programs(config, which, partitioner, sizes, cast(Codec, CODEC.value)))
    described = report(programs, target)
    mesh = {axis: partitioner.mesh.shape[axis] for axis in AXES}
    settings = {"topology": TOPOLOGY.value, "program": which, "chips": len(target.devices), "mesh": mesh}
    show(programs)
    verdict = "fits" if described["fits"] else "does not fit"
    print(f"{verdict} {target.memory / GIB:.2f} GiB a chip, {len(target.devices)} chips as {mesh}")
    if described["seconds_at_least"] is not None:
        print(f"one run of each takes at least {1000 * described['seconds_at_least']:.1f} ms, by a chip's peak")
    if OUTPUT.value:
        write_json(Path(OUTPUT.value), {**settings, **dataclasses.asdict(sizes), **described})
    if not described["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
