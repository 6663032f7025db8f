"""Bytes on the wire against loss: which taps, by which codec.

    python -m experiments.benchmarks.wire_bytes --workdir=runs/sciq --output=experiments/results/wire_bytes.json

Takes the plugins that `python -m experiments.sciq` has trained in the same workdir, and measures each on SciQ's test
rows with taps and corrections through each codec, the device always asked. Bytes are those of the arrays of one
exchange, down and up. Beside the JSON it writes a plot (.png).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from configs import default
from experiments.hardware import hardware
from spa_jax import command
from spa_jax.data.encoding import Encoder
from spa_jax.data.pairs import read_json_lines
from spa_jax.data.pipeline import plan_batches
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.models.combine import with_correction
from spa_jax.models.llama import Llama, Params
from spa_jax.models.plugin import PluginConfig
from spa_jax.split.wire import CODECS, Codec, bytes_per_position, decode, encode
from spa_jax.training import loop
from spa_jax.training.features import Features
from spa_jax.training.objective import corrections
from spa_jax.training.tap_cache import FeatureSpec, TapCache
from spa_jax.training.vocabulary_loss import token_losses
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import cache_directory, load_backbone

WORKDIR = flags.DEFINE_string("workdir", "runs/sciq", "Of experiments.sciq.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/wire_bytes.json", "Where to write the table.")

RUNS = ("spa taps all", "spa taps every:3", "spa seed 0", "spa taps last:4", "spa taps last:2", "spa taps last:1")
MAX_LENGTH, BATCH = 320, 8


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def losses(
    plugin: PluginConfig, model: Llama, codec: Codec, params: Params, frozen: Params, features: Features
) -> jax.Array:
    """Cross-entropy of each target with the device asked, all that crosses the wire encoded and decoded."""

    def crossed(x: jax.Array) -> jax.Array:
        return decode(encode(codec, x), jnp.dtype(jnp.float32))

    g = corrections(plugin, params, features._replace(taps=crossed(features.taps)), model)
    return token_losses(model, frozen, with_correction(plugin.setting, features.hidden, crossed(g)), features.targets)


def measure(backbone: Backbone, directory: Path, test: Path) -> dict[str, dict[str, Any]]:
    """Codec -> bytes of an exchange and test loss of a run's plugin."""
    plugin = load_plugin(directory / "plugin")
    side, width = plugin.config.side, plugin.config.hidden_size
    model = Llama(backbone.config, side.taps)
    examples, _ = Encoder(backbone.tokenizer, plugin.template, MAX_LENGTH).encode_all(read_json_lines(str(test)))
    cache = TapCache(cache_directory() / "taps", FeatureSpec(backbone.fingerprint, side.taps, width, "float32"))
    loop.fill_cache(cache, model, backbone.params, BATCH, examples)
    batches = [cache.collate(examples, rows) for rows in plan_batches(examples, BATCH)]
    rows: dict[str, dict[str, Any]] = {}
    for codec in CODECS:
        each = [losses(plugin.config, model, codec, plugin.params, backbone.params, batch) for batch in batches]
        flat = np.concatenate([np.asarray(loss)[batch.weights > 0] for loss, batch in zip(each, batches)])
        size = bytes_per_position(codec, len(side.taps), width) + bytes_per_position(codec, 1, width)
        rows[codec] = {"taps": list(side.taps), "bytes": size, "loss": float(flat.mean())}
    return rows


def plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Loss over bytes, a line a tap list."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, codecs in results.items():
        points = sorted((row["bytes"], row["loss"]) for row in codecs.values())
        axes.plot(*zip(*points), marker="o", label=f"{name}: {len(codecs['float32']['taps'])} taps")
    axes.set(xscale="log", xlabel="bytes of an exchange, down and up", ylabel="nats per answer token, device asked")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    workdir = Path(WORKDIR.value)
    found = [name for name in RUNS if (workdir / name / "plugin").exists()]
    if not found:
        raise UserError(f"'{workdir}' holds no plugin of python -m experiments.sciq: run that first")
    backbone = load_backbone(default.get_config().backbone)
    results = {name: measure(backbone, workdir / name, workdir / "data" / "test.jsonl") for name in found}
    table = Table("run", "codec", "taps", "bytes an exchange", "loss")
    for name, codecs in results.items():
        for codec, row in codecs.items():
            table.add_row(name, codec, str(len(row["taps"])), f"{row['bytes']:,}", f"{row['loss']:.4f}")
    Console().print(table)
    output = Path(OUTPUT.value)
    write_json(
        output, {"command": "python -m experiments.benchmarks.wire_bytes", "hardware": hardware(), "rows": results}
    )
    plot(output.with_suffix(".png"), results)


if __name__ == "__main__":
    command.run(main)
