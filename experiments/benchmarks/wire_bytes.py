"""Bytes on the wire against loss: which taps, by which codec.

    python -m experiments.benchmarks.wire_bytes --data=DIR

Takes plugins of the ablations on SciQ (`experiments.paper.ablations`), which are trained where they are not there, and
measures each on SciQ's test rows with taps and corrections through each codec, the device always asked. Bytes are those
of the arrays of one exchange, down and up. Beside the JSON it writes a plot (.png).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.benchmarks.output import output_path, write_result
from experiments.paper import ablations
from experiments.paper.report import open_store
from experiments.paper.store import CellStore
from experiments.record import print_table
from spa_jax import command
from spa_jax.choices import CODECS, Codec
from spa_jax.data.row_formats import read_pairs
from spa_jax.models.combine import with_correction
from spa_jax.models.llama import Llama, Params, unit
from spa_jax.models.plugin import PluginConfig
from spa_jax.split.wire import bytes_per_position, decode, encode
from spa_jax.training.corrected import corrected_row, run_upper
from spa_jax.training.features import Features
from spa_jax.training.methods import recipe_for
from spa_jax.training.objective import corrections
from spa_jax.training.rows import make_encoder
from spa_jax.training.scorer import Scorer
from spa_jax.training.vocabulary_loss import token_losses
from spa_jax.weights.plugin import load_plugin

ROWS = ("spa taps all", "spa taps every:3", "spa seed 0", "spa taps last:4", "spa taps last:2", "spa taps last:1")
"""Labels of the plugins that are measured, among the ablations on SciQ."""
BATCH = 8


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def losses(
    plugin: PluginConfig, model: Llama, codec: Codec, params: Params, frozen: Params, features: Features
) -> tuple[jax.Array, jax.Array]:
    """Computes the cross-entropy `[B,R]` of each target with the device asked, all that crosses the wire encoded and
    decoded, and the targets' weights."""

    def crossed(x: jax.Array) -> jax.Array:
        return decode(encode(codec, x), jnp.dtype(jnp.float32))

    row = corrected_row(model, frozen, features, plugin.edits == "all")
    g = corrections(plugin, params, features._replace(taps=crossed(features.taps)), model)
    g = unit(model, row.states) * crossed(g)
    hidden = run_upper(model, frozen, row, with_correction(plugin.setting, row.states, g))
    return token_losses(model, frozen, hidden, features.targets), features.weights


def measure(store: CellStore, row: str) -> dict[str, dict[str, Any]]:
    """Returns, for each codec, the bytes of an exchange and the test loss of a row's plugin."""
    training = ablations.training(store.scale, "sciq", row)
    plugin = load_plugin(store.train(training) / "plugin")
    config, method, backbone = store.config(training), plugin.config, store.backbone
    rows = read_pairs(str(store.single_questions("sciq") / "test.jsonl"))
    examples, _ = make_encoder(backbone, config.data).encode_all(rows)
    scorer = Scorer(backbone, recipe_for(method), examples, BATCH, config.tap_cache)
    found: dict[str, dict[str, Any]] = {}
    for codec in CODECS:
        loss = scorer.per_token(functools.partial(losses, method, scorer.model, codec), plugin.params)
        sizes = [bytes_per_position(codec, count, method.hidden_size) for count in (len(method.taps), 1)]
        found[codec] = {"taps": list(method.taps), "bytes": sum(sizes), "loss": float(np.mean(loss))}
    return found


def plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Draws loss over bytes, a line for each list of taps."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, codecs in results.items():
        points = sorted((row["bytes"], row["loss"]) for row in codecs.values())
        axes.plot(*zip(*points), marker="o", label=f"{name}: {len(codecs['float32']['taps'])} taps")
    axes.set(xscale="log", xlabel="bytes of an exchange, down and up", ylabel="nats per answer token, device asked")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    store = open_store()
    results = {row: measure(store, row) for row in ROWS}
    print_table(
        ("run", "codec", "taps", "bytes an exchange", "loss"),
        [
            (name, codec, str(len(row["taps"])), f"{row['bytes']:,}", f"{row['loss']:.4f}")
            for name, codecs in results.items()
            for codec, row in codecs.items()
        ],
    )
    write_result("wire_bytes", {"rows": results}, "--data=DIR")
    plot(output_path("wire_bytes").with_suffix(".png"), results)


if __name__ == "__main__":
    command.run(main)
