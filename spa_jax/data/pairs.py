"""Rows of data: a source and a target, or a conversation of several; read from a file or the embedded data set."""

import dataclasses
from types import NoneType

from spa_jax.data import persona
from spa_jax.data.json_rows import read_json_rows
from spa_jax.data.text import check_text
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
    pairs = []
    for origin, row in read_json_rows(path):
        for column in ("source", "target"):
            if type(row.get(column)) is not str or not row[column].strip():
                raise UserError(f"{origin}: column '{column}' is missing, empty or not text; columns are {sorted(row)}")
        if type(row.get("answer")) not in (str, NoneType):
            raise UserError(f"{origin}: column 'answer' is not text")
        for column in ("source", "target", "answer"):
            check_text(row.get(column) or "", f"{origin}: column '{column}'")
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
