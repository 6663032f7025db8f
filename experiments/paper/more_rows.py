"""Rows of the data-size ablation: a task's splits, each followed by the rows of `SPLIT_more.jsonl` where it is there.

Paragraphs of XSum's articles break at line ends in some rows and at spaces in others, so every run of white space in
them becomes one space.
"""

import json
from pathlib import Path

from experiments.paper.single_questions import SPLITS
from spa_jax.data.row_files import read_rows
from spa_jax.files import write_bytes

COLLAPSED = {"xsum": "document"}
"""Task -> its column in which white space is collapsed."""


def write_splits(task: str, directory: Path, output: Path) -> None:
    """Writes the task's splits as `SPLIT.jsonl`.

    Args:
        task: name of the task.
        directory: of its files as JSON lines, with the columns they have on the hub.
        output: where the files go.

    Raises:
        UserError: a file cannot be read or written.
    """
    for split in SPLITS:
        parts = [directory / f"{split}.jsonl", *directory.glob(f"{split}_more.jsonl")]
        rows = [row for part in parts for _, row in read_rows(str(part))]
        if (column := COLLAPSED.get(task)) is not None:
            rows = [{**row, column: " ".join(row[column].split())} for row in rows]
        write_bytes(output / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
