"""Rows of data: a source and a target, or a conversation of several; read from a file or the embedded data set."""

import dataclasses
import json
from pathlib import Path

from spa_jax.data import persona
from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pair:
    """A row: what the model reads and what it should answer.

    Attributes:
        source: the question, instruction or text.
        target: the answer that is trained for.
        answer: the phrase that a right generation contains, if the data set has one.
        origin: names the row in messages, such as `rows.jsonl, line 3`.
        later: the later turns of the same conversation, in order.
        references: further answers that are as good as the target, by other people.
    """

    source: str
    target: str
    answer: str | None = None
    origin: str = ""
    later: tuple["Pair", ...] = ()
    references: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple["Pair", ...]:
        """All turns of the conversation: this pair and the later ones."""
        return (self, *self.later)


def read_json_lines(path: str) -> list[Pair]:
    """Reads rows of `{"source": ..., "target": ...}`, one JSON object a line, optionally with `"answer"`.

    Raises:
        UserError: the file is missing, unreadable or empty, a line is no JSON object, or a column is missing, empty or
            not text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the data file '{path}': {error}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        origin = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{origin} is not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise UserError(f'{origin} is not a JSON object such as {{"source": "...", "target": "..."}}')
        for column in ("source", "target"):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise UserError(f"{origin}: column '{column}' is missing, empty or not text; columns are {sorted(row)}")
        if not isinstance(row.get("answer"), str | None):
            raise UserError(f"{origin}: column 'answer' is not text")
        pairs.append(Pair(row["source"], row["target"], row.get("answer"), origin))
    if not pairs:
        raise UserError(f"the data file '{path}' has no rows")
    return pairs


def embedded_persona(seed: int, phrasings: int) -> tuple[list[Pair], list[Pair]]:
    """Returns training and held-out rows of the embedded data set, one invented person's life.

    Args:
        seed: picks the person.
        phrasings: training phrasings of each fact; 0 for all.
    """
    splits = persona.generate(seed, phrasings or None)
    train, held_out = (
        [Pair(pair.source, pair.target, pair.answer, f"persona '{pair.fact_id}'") for pair in split] for split in splits
    )
    return train, held_out
