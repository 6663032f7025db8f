"""The router's worth at every share of tokens that the device is asked for: loss at all of them, ROUGE-L at three.

    python -m experiments.paper.router_curve --scale=mini --data=DIR

Beside the router: choosing at random, by the entropy of the base's next-token distribution, and by the gain itself, as
a perfect router would. The area between a curve and never asking, over the gap to always asking, is RouteLLM's APGR
(Ong et al. 2024) with loss for quality. Losses are of all target tokens of the test split, teacher-forced.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float

from experiments.paper import report as reporting
from experiments.paper.cells import Cell, cell_of, plugin_training
from experiments.paper.report import Rows, entry, plt, run_report, write
from experiments.paper.scales import BUDGET, TITLES, Scale
from experiments.paper.store import CellStore
from experiments.record import hardware
from spa_jax.data.tasks import load_split
from spa_jax.decoding.encoders import task_encoder
from spa_jax.files import write_json
from spa_jax.models.llama import Params
from spa_jax.scoring.router_curve import gap_recovered, loss_by_share, random_loss_by_share
from spa_jax.training.features import Features
from spa_jax.training.methods import recipe_for
from spa_jax.training.outcomes import Outcomes
from spa_jax.training.scorer import Scorer
from spa_jax.weights.plugin import Plugin, load_plugin

flags.adopt_module_key_flags(reporting)  # --help shows them

TASKS, BUDGETS = ("xsum", "sciq"), (0.25, 0.5, 0.75)
BATCH, POINTS = 8, 41


def cells(scale: Scale) -> list[Cell]:
    """Returns SPA at each budget, of each task."""
    return [cell_of(plugin_training(scale, task), budget=budget) for task in TASKS for budget in BUDGETS]


def curves(store: CellStore, task: str) -> dict[str, Any] | None:
    """Returns `{who chooses: {"share": [...], "loss": [...], ...}}`, measured once and kept."""
    path = store.results / "router_curve" / f"{task}.json"
    kept = store.kept(path)
    if kept is not None or not store.may_run:
        return kept
    plugin = load_plugin(store.train(plugin_training(store.scale, task)) / "plugin")
    outcomes, entropy = outcomes_of(store, plugin, task)
    unconsulted, consulted = (np.asarray(part, np.float64) for part in (outcomes.unconsulted, outcomes.consulted))
    losses = {
        "router": loss_by_share(unconsulted, consulted, np.asarray(outcomes.probability)),
        "random": random_loss_by_share(unconsulted, consulted),
        "entropy of f": loss_by_share(unconsulted, consulted, entropy),
        "perfect router": loss_by_share(unconsulted, consulted, unconsulted - consulted),
    }
    every, shares = np.linspace(0, 1, len(unconsulted) + 1), np.linspace(0, 1, POINTS)
    found: dict[str, Any] = {"hardware": hardware(), "tokens": len(unconsulted), "share": shares.round(4).tolist()}
    for name, curve in losses.items():
        found[name] = {
            "loss": np.interp(shares, every, curve).round(4).tolist(),
            "at_budget": float(np.interp(BUDGET, every, curve)),
            "least": float(curve.min()),
            "least_at": float(every[curve.argmin()]),
            "gap_recovered": gap_recovered(curve),
        }
    write_json(path, found)
    return found


def outcomes_of(store: CellStore, plugin: Plugin, task: str) -> tuple[Outcomes, Float[np.ndarray, " N"]]:
    """Computes losses of all target tokens of the test split, and the entropy in nats of what the base expects."""
    encoder = task_encoder(store.backbone, plugin.template, task, date=plugin.date)
    examples, _ = encoder.encode_all(load_split(task, store.directory(task), "test"))
    scorer = Scorer(store.backbone, recipe_for(plugin.config), examples, BATCH)

    @jax.jit
    def entropy(_: Params, frozen: Params, features: Features) -> tuple[Array, Array]:
        def of_row(hidden: Array) -> Array:  # one row at a time, so that little of size V exists
            log_p = jax.nn.log_softmax(scorer.model.apply({"params": frozen}, hidden, method="logits"))
            return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

        return jax.lax.map(of_row, features.states), features.weights

    return scorer.outcomes(plugin.params), scorer.per_token(entropy, plugin.params)


def report(store: CellStore) -> None:
    rows: Rows = {}
    figure, panels = plt.subplots(1, len(TASKS), figsize=(4.5 * len(TASKS), 3.4), layout="constrained", squeeze=False)
    for task, axes in zip(TASKS, panels[0]):
        found = curves(store, task) or {}
        for name in ("router", "entropy of f", "random", "perfect router") if found else ():
            curve = found[name]
            rows[f"{TITLES[task]}, {name}"] = {
                f"loss at {BUDGET}": entry(curve, "at_budget"),
                "least loss": entry(curve, "least"),
                "at a share of": entry(curve, "least_at"),
                "APGR": entry(curve, "gap_recovered"),
            }
            axes.plot(found["share"], curve["loss"], label=name)
        axes.set(title=TITLES[task], xlabel="share of tokens asked for", ylabel="nats per target token")
        axes.legend()
        for budget in BUDGETS:
            result = store.result(cell_of(plugin_training(store.scale, task), budget=budget))
            rows[f"{TITLES[task]}, generated at {budget}"] = {
                "ROUGE-L": entry(result, "score/rougeL"),
                "share of generated tokens": entry(result, "consulted_share"),
            }
    write(store, "router_curve", "router_curve", "Cost and quality of the router", rows)
    figure.savefig(store.results / "router_curve.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_report(report)
