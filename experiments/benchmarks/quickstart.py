"""The README's main job, measured: train on the embedded persona, then ask every held-out phrasing.

    python -m experiments.benchmarks.quickstart --workdir=runs/quickstart --output=experiments/results/quickstart.json

An answer is right when the greedy generation contains the fact, letter case and punctuation aside.
"""

import time
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from configs import quickstart
from experiments.hardware import hardware
from spa_jax import command
from spa_jax.data.encoding import Encoder
from spa_jax.data.persona import PersonaRow, generate, is_right
from spa_jax.decoding.fused import FusedModel
from spa_jax.files import write_json
from spa_jax.models.combine import Setting
from spa_jax.training.config import parse
from spa_jax.training.run import train
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin, load_plugin
from spa_jax.weights.registry import load_backbone

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Directory of the training run; resumed where it stopped.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/quickstart.json", "Where to write the result.")

BATCH = 16
MAX_NEW_TOKENS = 40
SETTINGS: tuple[Setting, ...] = ("base", "spa", "s1")


def ask(backbone: Backbone, plugin: Plugin, setting: Setting, pairs: list[PersonaRow]) -> dict[str, float | list[str]]:
    """Greedy answers to all pairs in one setting: share of right ones by kind, consulted share, and what was wrong."""
    model = FusedModel(backbone, plugin, setting)
    encoder = Encoder(backbone.tokenizer, plugin.template, backbone.config.max_position_embeddings)
    prompts = [encoder.prompt(pair.source) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))
    right: dict[str, list[bool]] = {}
    consulted: list[bool] = []
    wrong = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for i, generation in zip(chosen, model.generate([prompts[i] for i in chosen], MAX_NEW_TOKENS)):
            text = encoder.tokenizer.decode(generation.tokens, skip_special_tokens=True)
            hit = is_right(text, pairs[i].answer)
            right.setdefault(pairs[i].kind, []).append(hit)
            consulted += generation.consulted
            if not hit:
                wrong.append(f"{pairs[i].source} -> {text} (want: {pairs[i].answer})")
    shares = {f"right/{kind}": sum(hits) / len(hits) for kind, hits in right.items()}
    return {**shares, "consulted_share": sum(consulted) / len(consulted), "wrong": wrong}


def main() -> None:
    config = parse(quickstart.get_config().to_dict())
    began = time.perf_counter()
    summary = train(config, Path(WORKDIR.value))
    seconds = time.perf_counter() - began
    plugin = load_plugin(Path(WORKDIR.value) / "plugin")
    backbone = load_backbone(plugin.backbone)
    _, held_out = generate(config.data.persona_seed)
    answers = {setting: ask(backbone, plugin, setting, held_out) for setting in SETTINGS}
    table = Table("setting", "facts right", "notes right", "consulted share")
    for setting, row in answers.items():
        table.add_row(setting, *(f"{row[key]:.3f}" for key in ("right/fact", "right/note", "consulted_share")))
    Console().print(table)
    result = {
        "command": "python -m experiments.benchmarks.quickstart",
        "hardware": hardware(),
        "run_seconds": seconds,
        "summary": summary,
        "held_out_answers": answers,
    }
    write_json(Path(OUTPUT.value), result)


if __name__ == "__main__":
    command.run(main)
