"""Prompts: a conversation, of what its user says and what is answered, or a text that is to be continued."""

import dataclasses
from collections.abc import Sequence

from spa_jax.data.pairs import Turn


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A text that is to be continued as it is, in no template."""

    text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns so far, each with the token ids of an answer that was generated, and nothing of other turns.

    >>> talk = Conversation().asked("Who are you?").answered("A model.", [5, 7, 2])
    >>> [turn.role for turn, _ in talk.asked("Whose?").turns]
    ['user', 'assistant', 'user']
    """

    turns: list[tuple[Turn, Sequence[int]]] = dataclasses.field(default_factory=list)

    def asked(self, question: str) -> "Conversation":
        """Returns the conversation with a question at its end."""
        return self._with(Turn("user", question))

    def answered(self, text: str, tokens: Sequence[int] = ()) -> "Conversation":
        """Returns the conversation with an answer at its end."""
        return self._with(Turn("assistant", text), tokens)

    def told(self, instructions: str) -> "Conversation":
        """Returns the conversation with instructions, a system turn, at its end."""
        return self._with(Turn("system", instructions))

    def _with(self, turn: Turn, tokens: Sequence[int] = ()) -> "Conversation":
        return Conversation([*self.turns, (turn, tokens)])
