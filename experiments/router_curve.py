"""What the router is worth at every share: loss against the share of tokens the device is asked for.

    python -m experiments.router_curve --plugin=DIR --data=FILE --output=experiments/results/router_curve_sciq.json

The plugin has a router; FILE has rows of `{"source", "target"}` it was not trained on, such as what `experiments.sciq`
leaves in `WORKDIR/data/test.jsonl`. Beside the router: choosing at random, by the entropy of the base's next-token
distribution, and by the gain itself, as a perfect router would. A plot lies beside the JSON.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from experiments.ablation import SHARE, hardware
from spa_jax import command
from spa_jax.data.encoding import Encoder
from spa_jax.data.pairs import read_json_lines
from spa_jax.data.pipeline import collate, plan
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.models.llama import Llama, Params
from spa_jax.scoring.router_curve import gap_recovered, loss_by_share, random_loss_by_share
from spa_jax.training.features import extract
from spa_jax.training.objective import Outcomes, token_outcomes
from spa_jax.weights.plugin import Plugin, load_plugin
from spa_jax.weights.registry import load_backbone

PLUGIN = flags.DEFINE_string("plugin", None, "A trained plugin with a router.")
DATA = flags.DEFINE_string("data", None, "JSON lines it was not trained on.")
MAX_LENGTH = flags.DEFINE_integer("max_length", 320, "Tokens of a row, beyond which its source is cut.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/router_curve.json", "Where to write the result.")

BATCH, POINTS = 8, 21


def main() -> None:
    if PLUGIN.value is None or DATA.value is None:
        raise UserError("name a plugin with --plugin=DIR and rows with --data=FILE")
    plugin = load_plugin(Path(PLUGIN.value))
    if not plugin.config.routed:
        raise UserError(f"a plugin trained as '{plugin.config.setting}' has no router")
    outcomes, entropy = outcomes_of(plugin, Path(DATA.value))
    skipped, asked = (np.asarray(part, np.float64) for part in (outcomes.skipped, outcomes.always))
    curves = {
        "router": loss_by_share(skipped, asked, np.asarray(outcomes.probability)),
        "random": random_loss_by_share(skipped, asked),
        "entropy of f": loss_by_share(skipped, asked, entropy),
        "perfect router": loss_by_share(skipped, asked, skipped - asked),
    }
    shares = np.linspace(0, 1, len(skipped) + 1)
    table = Table("chosen by", f"loss at a share of {SHARE}", "least loss", "at a share of", "gap recovered")
    rows: dict[str, dict[str, Any]] = {}
    for name, losses in curves.items():
        best = int(np.argmin(losses))
        rows[name] = {
            f"loss at {SHARE}": float(np.interp(SHARE, shares, losses)),
            "least loss": float(losses[best]),
            "share of the least loss": float(shares[best]),
            "gap recovered": gap_recovered(losses),
            "loss by share": np.interp(np.linspace(0, 1, POINTS), shares, losses).round(4).tolist(),
        }
        table.add_row(name, *(f"{value:.3f}" for value in list(rows[name].values())[:4]))
        plt.plot(shares, losses, label=name)
    Console().print(table)
    used = float(np.mean(np.asarray(outcomes.probability) > plugin.config.threshold))
    said = "python -m experiments.router_curve --plugin=DIR --data=FILE"
    output = Path(OUTPUT.value)
    summary = {"tokens": len(skipped), "share at the plugin's threshold": used, "curves": rows}
    write_json(output, {"command": said, "hardware": hardware(), **summary})
    plt.xlabel("share of tokens the device is asked for")
    plt.ylabel("nats per target token")
    plt.legend()
    plt.savefig(output.with_suffix(".png"), dpi=120)


def outcomes_of(plugin: Plugin, data: Path) -> tuple[Outcomes, Float[np.ndarray, " N"]]:
    """Losses of all target tokens, and the entropy in nats of what the base expects there."""
    backbone = load_backbone(plugin.backbone)
    plugin.check(backbone)
    encoder = Encoder(backbone.tokenizer, plugin.template, MAX_LENGTH.value)
    examples, _ = encoder.encode_all(read_json_lines(str(data)))
    model = Llama(backbone.config, plugin.config.side.taps, jnp.dtype(jnp.float32))

    @jax.jit
    def step(params: Params, frozen: Params, batch: Any) -> tuple[Outcomes, Array, Array]:
        features = extract(model, frozen, batch, plugin.config.side.attends)
        log_p = jax.nn.log_softmax(model.apply({"params": frozen}, features.hidden, method="logits"))
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return token_outcomes(plugin.config, model, params, frozen, features), entropy, features.weights

    parts = []
    for rows in plan(examples, BATCH):
        outcomes, entropy, weights = jax.device_get(step(plugin.params, backbone.params, collate(examples, rows)))
        parts.append([leaf[weights > 0] for leaf in (*outcomes, entropy)])
    columns: list[Any] = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
    return Outcomes(*columns[:-1]), columns[-1]


if __name__ == "__main__":
    command.run(main)
