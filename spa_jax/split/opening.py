"""The taps of prompts in messages, for a device that keeps them or answers them.

Shape letters: G groups (prompts), T prompt tokens, P taps, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spa_jax.split import wire
from spa_jax.split.cloud import CloudConfig
from spa_jax.split.messages_pb2 import Reply, Taps
from spa_jax.split.wire import Encoded

CHUNK_POSITIONS = 64
"""Most positions in one message."""


def prompt_parts(taps: Encoded, lengths: Int[np.ndarray, " G"], width: int) -> list[Taps]:
    """Makes messages with the taps `[G,T,P,D]` of prompts, of all positions below each length.

    Args:
        taps: on the host.
        lengths: positions of each prompt.
        width: hypotheses of each; the prompt is of the first one's row.
    """
    messages = []
    for group, length in enumerate(lengths):
        positions = np.arange(length)
        for begin in range(0, len(positions), CHUNK_POSITIONS):
            part = positions[begin : begin + CHUNK_POSITIONS]
            packed = wire.pack(jax.tree.map(lambda leaf, at=(group, part): leaf[at], taps))
            rows = [group * width] * len(part)
            messages.append(Taps(rows=rows, positions=part.tolist(), taps=packed, prompt=True))
    return messages


class PromptQuestions:
    """The questions about prompts that are corrected, and the answers so far.

    Attributes:
        states: of the prompts at the entry, uncorrected, `[G,T,D]`.
        taps: `[G,T,P,D]` on the host.
        g: the answers `[G,T,D]`, zero where there is none.
        left: questions that are not answered yet.
    """

    def __init__(
        self, config: CloudConfig, states: Float[Array, "G T D"], taps: Encoded, lengths: Int[np.ndarray, " G"]
    ) -> None:
        self._config, self.states = config, states
        self.taps = wire.to_host(taps)
        self.g = jax.tree.map(np.array, wire.to_host(wire.encode(config.codec, jnp.zeros(states.shape))))
        self.left = prompt_parts(self.taps, lengths, config.width)

    def ask(self, step: int) -> Taps:
        """Returns the next question."""
        self.left[0].step = step
        return self.left[0]

    def take(self, reply: Reply) -> None:
        """Takes the answer to it.

        Raises:
            WireError: it does not have g for each position.
        """
        question = self.left[0]
        d = self._config.model.config.hidden_size
        g = wire.unpack(self._config.codec, reply.g, (len(question.positions), d))
        group, positions = question.rows[0] // self._config.width, np.array(question.positions)
        for whole, part in zip(jax.tree.leaves(self.g), jax.tree.leaves(g), strict=True):
            whole[group, positions] = part
        self.left.pop(0)
