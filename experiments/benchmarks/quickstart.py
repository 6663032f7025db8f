"""The README's main job, measured: train on the embedded persona, then ask every held-out phrasing.

    python -m experiments.benchmarks.quickstart --workdir=runs/quickstart

An answer is right when the greedy generation contains the fact, letter case and punctuation aside.
"""

import time
from pathlib import Path

from absl import flags

from configs import quickstart
from experiments.benchmarks.output import write_result
from experiments.record import print_table
from spa_jax import command
from spa_jax.data.persona import PersonaRow, generate, is_right
from spa_jax.decoding.encoders import prompt_encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.models.combine import Setting
from spa_jax.training.config import parse
from spa_jax.training.run import train
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin, load_plugin
from spa_jax.weights.registry import load_backbone

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Directory of the training run; resumed where it stopped.")

BATCH = 16
MAX_NEW_TOKENS = 40
SETTINGS: tuple[Setting, ...] = ("base", "spa", "s1")


def ask(backbone: Backbone, plugin: Plugin, setting: Setting, pairs: list[PersonaRow]) -> dict[str, float | list[str]]:
    """Answers all pairs greedily in one setting; returns right shares by kind, consulted share and wrong answers."""
    model = FusedModel(backbone, plugin, setting)
    encoder = prompt_encoder(backbone, plugin)
    asked = sorted(((encoder.prompt(pair.source), pair) for pair in pairs), key=lambda each: len(each[0]))
    batches = [[prompt for prompt, _ in asked[start : start + BATCH]] for start in range(0, len(asked), BATCH)]
    generations = [generation for batch in batches for generation in model.generate(batch, MAX_NEW_TOKENS)]
    right: dict[str, list[bool]] = {}
    wrong = []
    for (_, pair), generation in zip(asked, generations):
        text = encoder.tokenizer.decode(generation.tokens, skip_special_tokens=True)
        hit = is_right(text, pair.answer)
        right.setdefault(pair.kind, []).append(hit)
        if not hit:
            wrong.append(f"{pair.source} -> {text} (want: {pair.answer})")
    shares = {f"right/{kind}": sum(hits) / len(hits) for kind, hits in right.items()}
    consulted = [consulted for generation in generations for consulted in generation.consulted]
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
    keys = ("right/fact", "right/note", "consulted_share")
    print_table(
        ("setting", "facts right", "notes right", "consulted share"),
        [[setting, *(f"{row[key]:.3f}" for key in keys)] for setting, row in answers.items()],
    )
    found = {"run_seconds": seconds, "summary": summary, "held_out_answers": answers}
    write_result("quickstart", found)


if __name__ == "__main__":
    command.run(main)
