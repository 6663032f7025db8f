"""What becomes of a generation when something goes wrong, against real clouds in processes of their own.

    python -m experiments.benchmarks.faults --plugin=DIR --output=experiments/results/faults.json

For each fault: what is documented, what was observed, how long it took, and how many tokens of another session on the
same cloud were wrong.
"""

import asyncio
import json
import tempfile
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.fault_bench import DEADLINE, FAULTS, NEW, Bench, observe
from experiments.hardware import hardware
from spa_jax import command
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import load_backbone

PLUGIN = flags.DEFINE_string("plugin", None, "Directory of a plugin.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/faults.json", "Where to write the table.")


def main() -> None:
    if PLUGIN.value is None:
        raise UserError("name a plugin with --plugin=DIR")
    plugin = load_plugin(Path(PLUGIN.value))
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(load_backbone(plugin.backbone), plugin, Path(PLUGIN.value), Path(name))
        with bench.cloud() as site:
            for fault in FAULTS:
                if not FAULTS[fault].alone:
                    rows[fault] = asyncio.run(observe(FAULTS[fault], site))
        for fault in FAULTS:
            if FAULTS[fault].alone:
                with bench.cloud(FAULTS[fault].expired) as site:
                    rows[fault] = asyncio.run(observe(FAULTS[fault], site))
    table = Table("fault", "documented", "observed", "seconds", "wrong tokens of others")
    for fault, row in rows.items():
        table.add_row(fault, *map(str, row.values()))
    Console(width=160).print(table)
    setting = {"deadline": DEADLINE, "new tokens": NEW}
    said = {
        "command": "python -m experiments.benchmarks.faults --plugin=DIR",
        "hardware": hardware(),
        **setting,
        "faults": rows,
    }
    write_json(Path(OUTPUT.value), json.loads(json.dumps(said)))


if __name__ == "__main__":
    command.run(main)
