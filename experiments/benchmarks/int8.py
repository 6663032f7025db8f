"""Losses of a backbone in 8 bits against one in floats.

    python -m experiments.benchmarks.int8 --data=DIR

SmolLM2 on the answers of SciQ's test questions: bytes, loss with a paired interval, how often its best token changes,
and what plugins are worth that were trained on floats or on 8 bits, each on either. The file it is loaded from keeps
most of its weights in 4 bits already, with scales over 32 of them; a checkpoint in bfloat16 may lose more or less.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console

from experiments.benchmarks.output import write_result
from spa_jax import command
from spa_jax.data.encoding import Example
from spa_jax.data.tasks import load_split
from spa_jax.decoding.encoders import task_encoder
from spa_jax.errors import UserError
from spa_jax.models.compute import WEIGHTS, Compute
from spa_jax.scoring.bootstrap import estimate
from spa_jax.scoring.evaluation import EvaluationConfig, evaluate
from spa_jax.training.config import with_defaults
from spa_jax.training.run import train
from spa_jax.training.sources import run_backbone
from spa_jax.training.vocabulary_loss import best_tokens
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import load_backbone

DATA = flags.DEFINE_string("data", None, "Directory with SciQ's splits as JSON lines.")
WORKDIR = flags.DEFINE_string("workdir", "runs/int8", "Directory of the two trainings.")

BACKBONE, ROWS, EPOCHS, RATE, BATCH = "smollm2-135m-instruct", "250", 5, 5e-4, 8


def losses_and_best_tokens(backbone: Backbone, examples: list[Example]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns for each row the losses of its target tokens, in nats, and the likeliest tokens in their places."""
    model = backbone.model()
    best = jax.jit(functools.partial(best_tokens, model))
    losses, tokens = [], []
    for _, one in run_backbone(model, backbone.params, BATCH, examples):
        real = one.weights > 0
        losses.append(np.asarray(one.base_loss)[real])
        tokens.append(np.asarray(best(backbone.params, one.states))[real])
    return losses, tokens


def count_bytes(backbone: Backbone) -> int:
    """Counts the bytes of the parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backbone.params))


def trained_on(weights: str) -> Path:
    """Runs or resumes a short training, and returns the directory of its plugin."""
    keys = {
        "backbone": BACKBONE, "compute.weights": weights, "data.task": "sciq", "data.directory": str(DATA.value),
        "side.entry": "head", "data.size": ROWS, "train.epochs": EPOCHS, "optimizer.learning_rate": RATE,
    }  # fmt: skip
    workdir = Path(WORKDIR.value) / weights
    train(with_defaults(keys), workdir)
    return workdir / "plugin"


def main() -> None:
    if DATA.value is None:
        raise UserError("name SciQ's directory with --data=DIR")
    backbones = {weights: load_backbone(BACKBONE, compute=Compute(weights=weights)) for weights in WEIGHTS}
    examples, _ = task_encoder(backbones["float"], "auto", "sciq", 0).encode_all(
        load_split("sciq", str(DATA.value), "test")
    )
    (plain, plain_best), (kept, kept_best) = (
        losses_and_best_tokens(backbones[weights], examples) for weights in WEIGHTS
    )
    count = sum(map(len, plain))
    more = [float(np.sum(b - a)) for a, b in zip(plain, kept)]
    per_token = len(plain) / count  # the mean is over rows, and is wanted over tokens
    found: dict[str, Any] = {
        "bytes": {"float32": count_bytes(backbones["float"]), "int8": count_bytes(backbones["int8"])},
        "target_tokens": count,
        "loss/float": float(np.sum(np.concatenate(plain))) / count,
        "loss/int8": float(np.sum(np.concatenate(kept))) / count,
        "loss/more": [per_token * x for x in estimate(more)],
        "other_best_token_percent": 100 * float(np.mean(np.concatenate(plain_best) != np.concatenate(kept_best))),
    }
    for trained in WEIGHTS:
        plugin = load_plugin(trained_on(trained))
        for run in WEIGHTS:
            config = EvaluationConfig("sciq", str(DATA.value), limit=1)
            summary = evaluate(config, backbones[run], plugin, Path(WORKDIR.value) / f"{trained}-on-{run}")
            found[f"loss/spa trained on {trained}, run on {run}"] = summary["loss/spa"]
    for name, value in found.items():
        Console().print(name, value)
    settings = {"rows": int(ROWS), "epochs": EPOCHS, "learning_rate": RATE}
    write_result("int8", {**settings, **found}, "--data=DIR")


if __name__ == "__main__":
    command.run(main)
