"""Rows of the ablations: single questions of SciQ and CoQA, as files of source and target that belong to no task.

Of each story of CoQA the first, a middle and the last question are taken. No room of a row is kept free for an answer,
as it is for a task's.
"""

import json
from pathlib import Path

from spa_jax.data.pairs import Pair
from spa_jax.data.row_files import read_rows
from spa_jax.data.tasks import Split, load_split
from spa_jax.errors import UserError
from spa_jax.files import write_bytes

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def write_splits(task: str, directory: str, output: Path) -> None:
    """Writes the task's splits as `SPLIT.jsonl` of `{"source", "target"}`.

    Args:
        task: `sciq` or `coqa`.
        directory: of the task's splits as JSON lines, with the columns they have on the hub.
        output: where the files go.

    Raises:
        UserError: no directory is named, or a file cannot be read.
    """
    if not directory:
        raise UserError(f"name a directory with {task}'s rows by --data=DIR: these rows are not read from the hub")
    for split in SPLITS:
        pairs = load_split(task, directory, split) if task == "sciq" else _coqa(Path(directory) / f"{split}.jsonl")
        lines = [json.dumps({"source": pair.source, "target": pair.target}) for pair in pairs]
        write_bytes(output / f"{split}.jsonl", "\n".join(lines).encode())


def _coqa(path: Path) -> list[Pair]:
    """Reads question, the turns before it, and the story last, so that what is cut from a long row is its end."""
    pairs = []
    for _, row in read_rows(str(path)):
        questions, answers = row["questions"], row["answers"]["input_text"]
        for turn in sorted({0, len(questions) // 2, len(questions) - 1}):
            if answers[turn].strip():
                history = "\n".join(f"{q} {a}" for q, a in zip(questions[:turn], answers[:turn]))
                source = f"Answer in a few words: {questions[turn]}\n\nAsked before:\n{history}\n\n{row['story']}"
                pairs.append(Pair(source, answers[turn]))
    return pairs
