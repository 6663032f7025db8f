"""Rows of data, whatever format they came in: a source and a target, or a conversation of several."""

import dataclasses
from typing import Literal, NamedTuple

from spa_jax.data import persona

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """One contribution to a conversation, by one of its sides."""

    role: Role
    content: str


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
        context: turns in front of the source, such as a system turn, which are read and not learnt.
        learnt: whether the target is trained for; else it is read alone.
    """

    source: str
    target: str
    answer: str | None = None
    origin: str = ""
    later: tuple["Pair", ...] = ()
    references: tuple[str, ...] = ()
    context: tuple[Turn, ...] = ()
    learnt: bool = True

    @property
    def turns(self) -> tuple["Pair", ...]:
        """All turns of the conversation: this pair and the later ones."""
        return (self, *self.later)

    @property
    def learnt_turns(self) -> tuple["Pair", ...]:
        """The turns whose targets are trained for."""
        return tuple(turn for turn in self.turns if turn.learnt)


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
