"""Memory, arithmetic and exchanges of training on TPU chips, by the compiler.

    python -m experiments.benchmarks.compiled --python=.venv-tpu/bin/python

LLaMA of 7, 13 and 70 billion parameters by SPA, LST, LoRA, Adapter and full fine-tuning, 8 rows of 1024 tokens a step;
what `compute.*`, `peft.remat` and an inner entry change on the 7 billion, and the cloud's programs on one chip and on
four; and SPA on the 7 billion from 4 to 256 chips with a row on every chip. Nothing is run and no TPU is needed:
`--python` is of an environment with the TPU compiler (pip install -e '.[tpu]'). Each program is compiled once and kept,
so that a killed run goes on; then the table and the plot are made from what is there.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from absl import flags
from rich.console import Console

from spa_jax import command
from spa_jax.errors import UserError
from spa_jax.files import write_bytes, write_json

PYTHON = flags.DEFINE_string(
    "python", "", "Python of an environment with the TPU compiler; without it nothing is added."
)
OUTPUT = flags.DEFINE_string("output", "experiments/results/compiled", "Directory of the results.")

BACKBONES = {"llama-7b": "v5e:2x4", "llama-13b": "v5e:4x4", "llama-2-70b": "v5p:4x4x4"}
HEAD = ("--config.side.entry=head", "--config.side.edits=targets")
SPA = ("--config.setting=spa", "--config.tap_cache.enabled=False", *HEAD)
METHODS: dict[str, tuple[str, ...]] = {
    "SPA": SPA,
    "LST": ("--config.setting=s3", "--config.side.kind=transformer", "--config.tap_cache.enabled=False", *HEAD),
    "LoRA": ("--config.setting=lora",),
    "Adapter": ("--config.setting=adapter",),
    "full": ("--program=finetune",),
}
TOPOLOGIES = {
    4: "v5e:2x2",
    8: "v5e:2x4",
    16: "v5e:4x4",
    32: "v5e:4x8",
    64: "v5e:8x8",
    128: "v5e:8x16",
    256: "v5e:16x16",
}
INNER = {
    f"e={entry}, edits={edits}": (f"--config.side.entry={entry}", f"--config.side.edits={edits}")
    for entry in (16, 24)
    for edits in ("targets", "all")
}
"""Corrections in front of an inner block."""
LORA = METHODS["LoRA"]
CHOICES: dict[str, tuple[str, ...]] = {
    "SPA, compute.attention=xla": (*SPA, "--config.compute.attention=xla"),
    "SPA, compute.unroll=4": (*SPA, "--config.compute.unroll=4"),
    "SPA, compute.weights=int8": (*SPA, "--config.compute.weights=int8"),
    **{f"SPA, {name}": (*SPA, *options) for name, options in INNER.items()},
    "LoRA, compute.attention=xla": (*LORA, "--config.compute.attention=xla"),
    "LoRA, peft.remat=dots": (*LORA, "--config.peft.remat=dots"),
    "LoRA, peft.remat=none": (*LORA, "--config.peft.remat=none"),
    "LoRA, compute.weights=int8": (*LORA, "--config.compute.weights=int8"),
}
"""On eight chips, beside the defaults: splash attention, a block at a time, bfloat16 weights, remat=full."""
CLOUD = ("--program=cloud", "--rows=8", "--length=896")
FOUR = ("--config.mesh.fsdp=1", "--config.mesh.tensor=4")
INT8 = ("--config.compute.weights=int8",)
CLOUDS: dict[str, tuple[str, ...]] = {
    "llama-7b, bfloat16": ("v5e:2x2", *FOUR, *HEAD),
    "llama-7b, bfloat16, 1 prompt": ("v5e:2x2", *FOUR, *HEAD, "--rows=1"),
    "llama-7b, int8": ("v5e:1x1", *INT8, *HEAD),
    **{f"llama-7b, bfloat16, {name}": ("v5e:2x2", *FOUR, *options) for name, options in INNER.items()},
    "llama-2-70b, bfloat16": ("v5p:2x2x1", *FOUR, *HEAD),
}
"""The topology, and options."""
GIB = 2**30


def compiled(name: str, backbone: str, topology: str, *options: str) -> dict[str, Any] | None:
    """Returns the report of `aot`, from before or made now; None where there is none and no compiler.

    Raises:
        UserError: the compiler cannot be run, or finds something wrong.
    """
    path = Path(OUTPUT.value) / f"{name}.json"
    if not path.exists():
        if not PYTHON.value:
            return None
        Console().print(f"compiling {name}")
        config = [f"--config=configs/paper/coqa.py:{backbone}", f"--topology={topology}", f"--output={path}"]
        done = subprocess.run(
            [PYTHON.value, "-m", "spa_jax.aot", *config, *options], capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1) or not path.exists():
            raise UserError(f"{name} could not be compiled: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(path.read_text(encoding="utf-8"))


def row(report: dict[str, Any] | None) -> list[str]:
    """Formats a report as cells of the table."""
    if report is None:
        return ["not compiled", *[""] * 4]
    fits = "yes" if report["fits"] else "no"
    size = "?" if report["peak_bytes_per_chip"] is None else f"{report['peak_bytes_per_chip'] / GIB:.2f}"
    memory = f"{size} of {report['chip_bytes'] / GIB:.2f}"
    if not all(program["cost"] for program in report["programs"]):
        return [memory, fits, "", "", ""]
    flops, exchanged = report["flops_per_chip"] / 1e12, report["collective_bytes_per_chip"] / GIB
    return [memory, fits, f"{flops:.1f}", f"{exchanged:.2f}", f"{1000 * report['seconds_at_least']:.0f}"]


def main() -> None:
    head = "| | chips | GiB a chip | fits | TFLOP a chip | GiB exchanged a chip | ms at least |"
    said = "`python -m experiments.benchmarks.compiled`; nothing was run on a TPU."
    size = "Eight rows of 1024 tokens, all of them targets."
    title = "# What a training step takes of a TPU chip, by the compiler"
    lines = [title, "", f"{said} {size}", "", head, "|---" * 7 + "|"]
    for backbone, topology in BACKBONES.items():
        for method, options in METHODS.items():
            found = compiled(f"{backbone}-{method.lower()}", backbone, topology, *options)
            lines.append(f"| {backbone}, {method} | {topology} | {' | '.join(row(found))} |")
    lines += ["", "What choices change on LLaMA-7B:", "", head, "|---" * 7 + "|"]
    for choice, options in CHOICES.items():
        found = compiled(f"llama-7b-{_file(choice)}", "llama-7b", "v5e:2x4", *options)
        lines.append(f"| {choice} | v5e:2x4 | {' | '.join(row(found))} |")
    lines += [
        "",
        "Exchanges that unrolling copies share a number and are counted once: with 4 blocks a turn, a quarter.",
    ]
    said = "The cloud's programs, 8 prompts of 896 tokens, of which a step adds a new token to each:"
    columns = "| | chips | GiB a chip | fits | GiB of weights and cache | GiB read and written a step |"
    lines += ["", said, "", columns, "|---" * 6 + "|"]
    for name, (topology, *chosen) in CLOUDS.items():
        found = compiled(f"cloud-{_file(name)}", name.partition(",")[0], topology, *CLOUD, *chosen)
        lines.append(f"| {name} | {topology} | {' | '.join(_step_row(found))} |")
    lines += ["", "SPA on LLaMA-7B, a row on every chip, up to eight chips to a copy:", "", head, "|---" * 7 + "|"]
    reports: dict[int, dict[str, Any]] = {}
    for chips, topology in TOPOLOGIES.items():
        spread = (f"--rows={chips}", f"--config.mesh.fsdp={min(chips, 8)}", "--config.mesh.tensor=1")
        found = compiled(f"llama-7b-spa-on-{chips}", "llama-7b", topology, *SPA, *spread)
        lines.append(f"| SPA | {topology} | {' | '.join(row(found))} |")
        reports |= {chips: found} if found else {}
    write_bytes(Path(OUTPUT.value) / "README.md", ("\n".join(lines) + "\n").encode())
    keys = ("mesh", "fits", "peak_bytes_per_chip", "flops_per_chip", "collective_bytes_per_chip")
    scaling = {str(chips): {key: found[key] for key in keys} for chips, found in reports.items()}
    write_json(Path(OUTPUT.value) / "scaling.json", scaling)
    _plot(reports)
    Console().print("\n".join(lines), markup=False)


def _file(name: str) -> str:
    """Turns a name into a part of a file's name."""
    return "-".join(re.findall(r"\w+", name.lower()))


def _step_row(report: dict[str, Any] | None) -> list[str]:
    if report is None or not report["fits"]:
        return ["not compiled" if report is None else "does not fit", *[""] * 3]
    step = next(program for program in report["programs"] if program["name"] == "step")
    memory = f"{report['peak_bytes_per_chip'] / GIB:.2f} of {report['chip_bytes'] / GIB:.2f}"
    return [memory, "yes", *(f"{size / GIB:.2f}" for size in (step["argument_bytes"], step["cost"]["bytes"]))]


def _plot(reports: dict[int, dict[str, Any]]) -> None:
    if not reports:
        return
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for key, label in (("peak_bytes_per_chip", "memory"), ("collective_bytes_per_chip", "exchanged in a step")):
        axes.plot(list(reports), [report[key] / GIB for report in reports.values()], "o-", label=label)
    axes.set(xscale="log", xticks=list(reports), xlabel="chips (v5e), a row on each", ylabel="GiB a chip", ylim=0)
    axes.set_xticklabels(map(str, reports))
    axes.legend(frameon=False)
    path = Path(OUTPUT.value) / "scaling.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    command.run(main)
