"""Say what will be learnt of own rows: python -m spa_jax.data check FILE [--backbone=NAME] [--eval=FILE] ...

Prints rows, answers and tokens, what is cut, held-out rows that are trained on too, and one row as the backbone reads
it, with its target tokens marked. Nothing is trained, and no weights are read. Options mean what the config keys of
spa_jax.train of these names mean; docs/training.md has the formats of rows.
"""

from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from spa_jax import command
from spa_jax.data.report import describe
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.printer import Printer
from spa_jax.training.config import RunConfig, with_defaults
from spa_jax.training.rows import load_own, make_encoder
from spa_jax.weights.registry import load_backbone

DEFAULTS = RunConfig()
BACKBONE = flags.DEFINE_string("backbone", DEFAULTS.backbone, "Backbone by name, directory or .gguf file.")
SEED = flags.DEFINE_integer("seed", DEFAULTS.seed, "Picks the rows that are held out.")
KEYS = {
    "hub": flags.DEFINE_string("hub", "", "Instead of FILE: a data set of the hub, org/name or org/name:config."),
    "columns": flags.DEFINE_string("columns", "", "Our columns and yours: source=question,target=answer."),
    "eval": flags.DEFINE_string("eval", "", "File of held-out rows; by default some of FILE's are held out."),
    "eval_fraction": flags.DEFINE_float("eval_fraction", DEFAULTS.data.eval_fraction, "Share of rows held out."),
    "template": flags.DEFINE_string("template", DEFAULTS.data.template, "chat, plain or auto."),
    "date": flags.DEFINE_string("date", DEFAULTS.data.date, "The day that a chat template with a date writes."),
    "max_length": flags.DEFINE_integer("max_length", DEFAULTS.data.max_length, "Most tokens of a row; 0 is 1024."),
}
ROW = flags.DEFINE_integer("row", 1, "Which training row to show, from 1.")
OUTPUT = flags.DEFINE_string("output", None, "File for the same as JSON.")

SHOWN = 10
"""Most rows that are named on the terminal."""


def show(report: dict[str, Any]) -> None:
    """Prints what `spa_jax.data.report.describe` says."""
    splits = [report["train"], report["held_out"]]
    table = Table("", "train", "held out")
    for name in splits[0]:
        values = [split[name] for split in splits]
        table.add_row(
            name.replace("_", " "), *(f"{len(value) if isinstance(value, list) else value:,}" for value in values)
        )
    console = Console()
    console.print(table)
    lines = [f"cut at its end: {row}" for split in splits for row in split["cut"]]
    lines += [f"asks the same: held-out {row} and training {like}" for row, like in report["overlap"]["same"]]
    lines += [f"asks nearly the same: held-out {row} and training {like}" for row, like in report["overlap"]["near"]]
    for line in lines[:SHOWN]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if len(lines) > SHOWN:
        console.print(f"... and {len(lines) - SHOWN} more, which --output=FILE has", highlight=False)
    printer = Printer()
    example = report["example"]
    console.print(
        f"\n{example['row']} in the template '{report['template']}', targets {printer.style_description}:\n",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
    for span in example["spans"]:
        printer.add(span["text"], span["target"])
    printer.finish()


def main(arguments: list[str]) -> None:
    named = arguments[1:]
    if arguments[:1] != ["check"] or len(named) != (0 if KEYS["hub"].value else 1):
        raise UserError("write `python -m spa_jax.data check FILE`, or `check --hub=org/name`")
    keys = {f"data.{name}": flag.value for name, flag in KEYS.items()}
    config = with_defaults({"seed": SEED.value, "data.train": "".join(named), **keys})
    train, held_out = load_own(config.data, config.seed)
    encoder = make_encoder(load_backbone(BACKBONE.value, read_weights=False), config.data)
    report = describe(train, held_out, encoder, ROW.value)
    if OUTPUT.value:
        write_json(Path(OUTPUT.value), report)
    show(report)


if __name__ == "__main__":
    command.run(main, positional=True)
