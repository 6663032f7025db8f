"""Rows of data, whatever format they came in: a source and a target, or a conversation of several."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeVar

from spa_jax.data import persona
from spa_jax.errors import UserError

Role = Literal["system", "user", "assistant"]
Note = TypeVar("Note")


class Turn(NamedTuple):
    """One contribution to a conversation, by one of its sides."""

    role: Role
    content: str


def exchanges(turns: Iterable[tuple[Turn, Note]], where: str) -> tuple[list[tuple[list[Turn], Turn, Note]], list[Turn]]:
    """Splits a conversation into its exchanges.

    Args:
        turns: each with something that is noted of it.
        where: names the conversation in messages.

    Returns:
        For each answer the turns that it answers, the user's last, the answer itself, and what is noted of it; and the
        turns after the last answer. A greeting, an answer in front of all users' turns, is among those that follow.

    Raises:
        UserError: an answer follows no user's turn.
    """
    found: list[tuple[list[Turn], Turn, Note]] = []
    before: list[Turn] = []
    for turn, note in turns:
        if turn.role == "assistant" and before and before[-1].role == "user":
            found.append((before, turn, note))
            before = []
        elif turn.role == "assistant" and (found or any(other.role == "user" for other in before)):
            raise UserError(f"{where}: an assistant's turn follows no user's turn: join it to the turn before")
        else:
            before.append(turn)
    return found, before


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
