"""SciQ's rows as sources and targets, for the experiments on it."""

from pathlib import Path
from typing import cast

from spa_jax.data.pairs import Pair
from spa_jax.data.tasks import Split, load_split

MAX_LENGTH = 320
"""Tokens of a row, beyond which the passage is cut."""


def read_sciq(path: Path) -> list[Pair]:
    """The rows of `DIR/SPLIT.jsonl`."""
    return load_split("sciq", str(path.parent), cast(Split, path.stem))
