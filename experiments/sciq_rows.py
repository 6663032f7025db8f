"""SciQ's rows as sources and targets, for the experiments on it."""

import json
from pathlib import Path

from spa_jax.data.pairs import Pair

MAX_LENGTH = 320
"""Tokens of a row, beyond which the passage is cut."""


def read_sciq(path: Path) -> list[Pair]:
    """SciQ's rows. The question comes first, so that what is cut from a long row is the end of its passage."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        source = f"Answer in a few words: {row['question']}\n\n{row['support']}"
        pairs.append(Pair(source, row["correct_answer"]))
    return pairs
