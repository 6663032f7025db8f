"""Measures how a generation ends when something goes wrong, against real clouds in processes of their own.

    python -m experiments.benchmarks.faults --plugin=DIR

For each fault: what is documented, what was observed, how long it took, and how many tokens of another session on the
same cloud were wrong.
"""

import asyncio
import tempfile
from pathlib import Path

from absl import flags

from experiments.benchmarks.fault_bench import DEADLINE, FAULTS, NEW, FaultHarness, observe
from experiments.benchmarks.output import write_result
from experiments.record import print_table
from spa_jax import command
from spa_jax.errors import UserError
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import load_backbone

PLUGIN = flags.DEFINE_string("plugin", None, "Directory of a plugin.")


def main() -> None:
    if PLUGIN.value is None:
        raise UserError("name a plugin with --plugin=DIR")
    plugin = load_plugin(Path(PLUGIN.value))
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        harness = FaultHarness(load_backbone(plugin.backbone), plugin, Path(PLUGIN.value), Path(name))
        with harness.cloud() as site:
            for fault in FAULTS:
                if not FAULTS[fault].alone:
                    rows[fault] = asyncio.run(observe(FAULTS[fault], site))
        for fault in FAULTS:
            if FAULTS[fault].alone:
                with harness.cloud(FAULTS[fault].expired) as site:
                    rows[fault] = asyncio.run(observe(FAULTS[fault], site))
    columns = ("fault", "documented", "observed", "seconds", "wrong tokens of others")
    print_table(columns, [[fault, *map(str, row.values())] for fault, row in rows.items()], 160)
    found = {"deadline": DEADLINE, "new tokens": NEW, "faults": rows}
    write_result("faults", found, "--plugin=DIR")


if __name__ == "__main__":
    command.run(main)
