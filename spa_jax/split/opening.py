"""The taps of prompts in messages, for a device that keeps them or answers them.

Shape letters: G groups (prompts), T prompt tokens, P taps, D width.
"""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from spa_jax.engine.group import Group
from spa_jax.split import wire
from spa_jax.split.messages_pb2 import Reply, Taps
from spa_jax.split.wire import CHUNK_POSITIONS, Codec


def prompt_parts(group: Group, length: int) -> Iterator[Taps]:
    """Makes messages with the kept taps of a prompt's tokens up to one, those left out that were corrected before; the
    prompt is of its first hypothesis' row."""
    for begin in range(group.skipped, length, CHUNK_POSITIONS):
        part = range(begin, min(begin + CHUNK_POSITIONS, length))
        kept = slice(part.start - group.skipped, part.stop - group.skipped)
        packed = wire.pack(jax.tree.map(lambda leaf, kept=kept: leaf[kept], group.prompt_taps))
        rows = [group.number * group.task.width] * len(part)
        yield Taps(rows=rows, positions=part, taps=packed, prompt=True)


class PromptQuestions:
    """The questions about prompts that are corrected, made one after another, and the answers so far.

    Attributes:
        left: positions that are not answered yet.
    """

    def __init__(self, groups: Sequence[Group], codec: Codec) -> None:
        self._groups, self._codec, self._width = groups, codec, groups[0].task.width
        self._g = [np.zeros(np.shape(group.prompt_states), np.float32) for group in groups]
        self._parts = itertools.chain.from_iterable(prompt_parts(group, len(group.prompt)) for group in groups)
        self.left = sum(len(group.prompt) - group.skipped for group in groups)
        self._asked = Taps()

    def ask(self, step: int) -> Taps:
        """Returns the next question."""
        self._asked = next(self._parts)
        self._asked.step = step
        return self._asked

    def take(self, reply: Reply) -> None:
        """Takes the answer to it.

        Raises:
            WireError: it does not have g for each position.
        """
        group, positions = self._asked.rows[0] // self._width, np.array(self._asked.positions)
        g = wire.unpack(self._codec, reply.g, (len(positions), self._g[group].shape[1]))
        self._g[group][positions] = wire.decode(g, np.float32)
        self.left -= len(positions)

    def end(self, answered: bool, keeps_taps: bool) -> None:
        """Lets the groups go on, with the answers if they are whole, and without their taps unless these are to be sent
        once more."""
        for group, g in zip(self._groups, self._g):
            if not keeps_taps:
                group.prompt_taps = []
            group.open(g if answered else None)
