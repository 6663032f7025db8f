"""The rows of `experiments.sciq` that decide, on CoQA.

    python -m experiments.coqa --data=DIR --workdir=runs/coqa --output=experiments/results/coqa.json [--only=TEXT]

DIR holds train.jsonl, validation.jsonl and test.jsonl with CoQA's columns (`stanfordnlp/coqa`). One row is one question
after the conversation so far; of each story the first, a middle and the last question are taken.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from experiments.ablation import run_rows, write_splits
from spa_jax import command
from spa_jax.data.pairs import Pair

DATA = flags.DEFINE_string("data", None, "Directory with CoQA's train.jsonl, validation.jsonl and test.jsonl.")
WORKDIR = flags.DEFINE_string("workdir", "runs/coqa", "Where runs and finished rows are kept.")
OUTPUT = flags.DEFINE_string("output", "experiments/results/coqa.json", "Where to write the table.")
ONLY = flags.DEFINE_string("only", "", "Run only rows whose name holds this text.")

FIXED = {"data.max_length": 512, "train.epochs": 8, "train.log_every": 100}
SEEDS = 3


def rows() -> dict[str, dict[str, Any]]:
    """Name of each row -> the keys it sets."""
    table: dict[str, dict[str, Any]] = {}
    for seed in range(SEEDS):
        table[f"s1 seed {seed}"] = {"setting": "s1", "seed": seed}
        table[f"spa seed {seed}"] = {"seed": seed}
        table[f"spa offset seed {seed}"] = {"router.offset": True, "seed": seed}
    table["spa offset cross-fitted"] = {"router.offset": True, "router.cross_fit": True, "router.margin": 0.25}
    table["s3"] = {"setting": "s3"}
    return table


def read(path: Path) -> list[Pair]:
    """Question, the turns before it, and the story last, so that what is cut from a long row is the story's end."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        questions, answers = row["questions"], row["answers"]["input_text"]
        for turn in sorted({0, len(questions) // 2, len(questions) - 1}):
            if answers[turn].strip():
                history = "\n".join(f"{q} {a}" for q, a in zip(questions[:turn], answers[:turn]))
                source = f"Answer in a few words: {questions[turn]}\n\nAsked before:\n{history}\n\n{row['story']}"
                pairs.append(Pair(source, answers[turn]))
    return pairs


def main() -> None:
    workdir = Path(WORKDIR.value)
    write_splits("CoQA", DATA.value, read, workdir)
    run_rows(rows(), FIXED, workdir, Path(OUTPUT.value), ONLY.value, "python -m experiments.coqa --data=DIR")


if __name__ == "__main__":
    command.run(main)
