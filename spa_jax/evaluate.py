"""Evaluate a plugin on a task: python -m spa_jax.evaluate --plugin=DIR/plugin --task=sciq --data=DIR --output=DIR

Losses over the whole split, then generations by beam search with their scores and the share of tokens the device was
asked for. Without --plugin, --backbone names a model that is evaluated alone. The same command again goes on where it
stopped. docs/training.md describes the output.
"""

import math
from pathlib import Path
from typing import Any, cast

from absl import flags
from rich.console import Console
from rich.table import Table

from spa_jax import command, compilation_cache
from spa_jax.choices import SETTINGS, Setting
from spa_jax.data.tasks import TASKS, Split
from spa_jax.errors import UserError
from spa_jax.models.compute import WEIGHTS, Compute, Weights
from spa_jax.scoring.evaluation import EvaluationConfig, evaluate
from spa_jax.scoring.rouge import TOKENIZERS
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.peft import load_trained
from spa_jax.weights.registry import load_backbone

flags.adopt_module_key_flags(compilation_cache)  # --help shows them
PLUGIN = flags.DEFINE_string("plugin", None, "Directory of a plugin, as a run leaves it, or its name on the hub.")
BACKBONE = flags.DEFINE_string("backbone", None, "Backbone by name, directory or .gguf file; the plugin's by default.")
KEPT = flags.DEFINE_enum("weights", "float", WEIGHTS, "int8 keeps the backbone's matrices in 8 bits.")
TASK = flags.DEFINE_enum("task", None, list(TASKS), "What to evaluate on.")
DATA = flags.DEFINE_string(
    "data", "", "Directory with the task's splits as JSON lines, by default the hub; or without --task your own file."
)
COLUMNS = flags.DEFINE_string("columns", "", "Our columns and your file's: source=question,target=answer.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 0, "Most tokens of an answer; 0 is the task's, or 128.")
SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Split of the task.")
LIMIT = flags.DEFINE_integer("limit", 0, "Generate for the first so many questions; 0 is all.")
SETTING = flags.DEFINE_enum("setting", None, SETTINGS, "base: the backbone alone; by default the plugin's own.")
THRESHOLD = flags.DEFINE_float("threshold", None, "Ask the device where p(consult) is above it, from 0 to 1.")
BUDGET = flags.DEFINE_float("budget", 0.0, "Instead of --threshold: largest share of validation tokens to ask for.")
BEAMS = flags.DEFINE_integer("beams", 4, "Width of the beam search; 1 is greedy.")
LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Beam search: above 0 favours longer answers.")
SHOTS = flags.DEFINE_integer("shots", 0, "Training rows to show before each question: 0 or 1.")
MAX_LENGTH = flags.DEFINE_integer("max_length", 0, "Tokens of a row, beyond which its source is cut; 0 is the task's.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prompts that are worked on at once.")
EFFECT = flags.DEFINE_bool("effect", False, "Also measure what the side network changes (Table 4 of the paper).")
ROUGE_TOKENIZER = flags.DEFINE_enum(
    "rouge_tokenizer", "english", list(TOKENIZERS), "What ROUGE counts: stems of English words, or any script's words."
)
OUTPUT = flags.DEFINE_string("output", None, "Directory for predictions.jsonl and evaluation.json.")
HTML = flags.DEFINE_bool("html", False, "Write report.html there too: every answer, its tokens coloured by source.")


def show(summary: dict[str, Any]) -> None:
    """Prints what `evaluation.json` says."""
    table = Table("", "", "95 % interval")
    for name, value in summary.items():
        mean, *interval = value if isinstance(value, list) else [value]
        whole = isinstance(mean, int)
        ends = (
            " to ".join(f"{end:.3f}" for end in interval) if all(map(math.isfinite, interval)) else "none, of one row"
        )
        table.add_row(name, f"{mean:,}" if whole else f"{mean:.3f}", ends)
    Console().print(table)


def main() -> None:
    compilation_cache.keep_programs()
    if OUTPUT.value is None or not (TASK.value or DATA.value):
        raise UserError("--output=DIR is needed, and --task=NAME or --data=FILE")
    if PLUGIN.value is None and BACKBONE.value is None:
        raise UserError("name a plugin with --plugin=DIR, or a backbone alone with --backbone=NAME")
    plugin = load_trained(plugin_directory(PLUGIN.value)) if PLUGIN.value is not None else None
    config = EvaluationConfig(
        TASK.value or "", DATA.value, cast(Split, SPLIT.value), LIMIT.value, cast(Setting | None, SETTING.value),
        THRESHOLD.value, BUDGET.value, BEAMS.value, LENGTH_PENALTY.value, SHOTS.value, MAX_LENGTH.value,
        BATCH_SIZE.value, EFFECT.value, ROUGE_TOKENIZER.value, COLUMNS.value, MAX_NEW_TOKENS.value,
    )  # fmt: skip
    backbone = load_backbone(
        BACKBONE.value or (plugin.backbone if plugin else ""), compute=Compute(weights=cast(Weights, KEPT.value))
    )
    show(evaluate(config, backbone, plugin, Path(OUTPUT.value), html=HTML.value))


if __name__ == "__main__":
    command.run(main, resumable=True)
