"""Predictions of a model with their scores, as JSON lines to which a resumed evaluation adds what is missing.

The first line describes the evaluation. A row is known by its id and by a hash of its source and references; none of
the data set's own texts is kept.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_jax.errors import UserError
from spa_jax.files import write_bytes


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One generation.

    Attributes:
        id: number of the row in its split, from 1, and of the turn where a row has several: `12` or `12.3`.
        hash: 16 hex digits that identify source and references.
        text: the generated text.
        sources: a letter for each token, EOS included: `d` where the device was asked, `c` where the cloud was alone.
        scores: score by name, see `spa_jax.scoring.scores`.
        pieces: the text that each token adds; empty in files of before there were any.
    """

    id: str
    hash: str
    text: str
    sources: str
    scores: dict[str, float]
    pieces: Sequence[str] = ()

    @property
    def line(self) -> str:
        """The line of the file."""
        return json.dumps({name: value for name, value in vars(self).items() if name != "pieces" or value})

    @property
    def tokens(self) -> list[tuple[str, str]]:
        """The text that each token adds and its letter in `sources`; the whole text and no letter where there are no
        pieces."""
        return list(zip(self.pieces, self.sources)) if self.pieces else [(self.text, "")]

    @property
    def group(self) -> str:
        """Number of the row, which the turns of one conversation share."""
        return self.id.partition(".")[0]


def hash_of(prompt: Sequence[int], references: Sequence[str]) -> str:
    """Returns 16 hex digits that identify a row's prompt and references."""
    return hashlib.sha256(json.dumps([list(prompt), list(references)]).encode()).hexdigest()[:16]


class Predictions:
    """A predictions file."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens or creates the file; a last line that was not written whole is dropped.

        Args:
            path: the file.
            identity: describes the evaluation, in JSON types.

        Raises:
            UserError: it cannot be written, or holds the predictions of another evaluation.
        """
        self._path = path
        self.rows: dict[str, Prediction] = {}
        if os.path.exists(path):  # which is false too for what cannot be looked up; writing then says why
            before, rows = read_predictions(path)
            changed = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
            if changed:
                raise UserError(
                    f"'{path}' holds predictions of another evaluation ({', '.join(changed)} differ): choose another "
                    "--output"
                )
            self.rows = {row.id: row for row in rows}
        lines = [json.dumps({"evaluation": identity}), *(row.line for row in self.rows.values())]
        write_bytes(path, "".join(line + "\n" for line in lines).encode())

    def add(self, rows: Sequence[Prediction]) -> None:
        """Appends rows and has them on disk before it returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(row.line + "\n" for row in rows)
        self.rows.update({row.id: row for row in rows})


def read_predictions(path: Path) -> tuple[dict[str, Any], list[Prediction]]:
    """Reads the identity of the evaluation and its rows in the order of their ids, each once, though two processes may
    have written the file.

    Args:
        path: of the file, compressed where its name ends in `.gz`.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        first, *lines = text.split("\n")[:-1]
        identity = json.loads(first)["evaluation"]
        rows = [Prediction(**json.loads(line)) for line in lines]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is no predictions file ({error}): delete it, or choose another --output") from error
    once = {row.id: row for row in rows}.values()
    return identity, sorted(once, key=lambda row: tuple(map(int, row.id.split("."))))
