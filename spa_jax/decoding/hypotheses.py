"""What a generation has chosen so far, and how it chooses on: by sampling, or by beam search.

A *group* is one prompt with its K hypotheses (one when sampling); groups are independent of each other. Shape letters:
G groups, K hypotheses of a group, N most new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

IMPOSSIBLE = -1e9
"""Score of a hypothesis that does not exist."""


class Finished(NamedTuple):
    """The best hypotheses of beam search that have ended, best first."""

    tokens: Int[Array, "G K N"]
    consulted: Bool[Array, "G K N"]
    scores: Float[Array, "G K"]
    """Summed log-probabilities over length ** penalty; `IMPOSSIBLE` where there is none yet."""


class Hypotheses(NamedTuple):
    """New tokens of all groups; the group first in every leaf."""

    tokens: Int[Array, "G K N"]
    """New tokens, of which `made` are there; after an EOS they mean nothing."""
    consulted: Bool[Array, "G K N"]
    """True where the device was asked for the token."""
    scores: Float[Array, "G K"]
    """Summed log-probabilities in nats, best first; beam search only."""
    made: Int[Array, " G"]
    done: Bool[Array, " G"]
    keys: PRNGKeyArray
    """`[G]`; each token is drawn by its group's key and its index, so groups do not depend on their company."""
    finished: Finished | None
    """Of beam search; None when sampling."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of one prompt, EOS included where it was reached, and for each whether the device was asked."""

    tokens: list[int]
    consulted: list[bool]
    score: float | None = None
    """Of beam search: summed log-probabilities in nats over length ** penalty."""

    @property
    def consulted_share(self) -> float:
        """Share of the tokens, EOS included, for which the device was asked."""
        return sum(self.consulted) / max(len(self.consulted), 1)


def init_hypotheses(groups: int, beams: int, room: int, seed: int | jax.Array, search: bool) -> Hypotheses:
    """No tokens yet. With `search` the first choice fans out from one hypothesis."""
    tokens = jnp.zeros((groups, beams, room), jnp.int32)
    consulted = jnp.zeros(tokens.shape, bool)
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, IMPOSSIBLE)
    scores = jnp.broadcast_to(scores[None, :], (groups, beams))
    keys = group_keys(seed, groups)
    finished = Finished(tokens, consulted, jnp.full((groups, beams), IMPOSSIBLE)) if search else None
    return Hypotheses(tokens, consulted, scores, jnp.zeros(groups, jnp.int32), jnp.zeros(groups, bool), keys, finished)


def group_keys(seed: int | jax.Array, groups: int) -> PRNGKeyArray:
    """`[G]`; a prompt's key is the same in whatever batch it is that many prompts from the first."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(groups))


def token_keys(keys: PRNGKeyArray, made: Int[Array, " G"]) -> PRNGKeyArray:
    """`[G]`, to draw the token with index `made` by."""
    return jax.vmap(jax.random.fold_in)(keys, made)


def last_tokens(hypotheses: Hypotheses) -> Int[Array, "G K"]:
    """The last token of each hypothesis; groups need at least one."""
    index = jnp.maximum(hypotheses.made - 1, 0)
    return jnp.take_along_axis(hypotheses.tokens, index[:, None, None], axis=2)[:, :, 0]


def parent_rows(parents: Int[Array, "G K"]) -> Int[Array, " R"]:
    """Indices among the R = G K rows of hypotheses that are given by their index within the group."""
    groups, beams = parents.shape
    return (parents + beams * jnp.arange(groups, dtype=parents.dtype)[:, None]).reshape(-1)


def select_active(active: Bool[Array, " G"], new: Hypotheses, old: Hypotheses) -> Hypotheses:
    """`new` for active groups and `old` for the others."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def to_generations(hypotheses: Hypotheses, eos_ids: Sequence[int]) -> list[Generation]:
    """The best hypothesis of each group; the state is fetched from the device."""
    best = hypotheses.finished or hypotheses
    tokens, consulted, made = jax.device_get((best.tokens[:, 0], best.consulted[:, 0], hypotheses.made))
    scores = None if hypotheses.finished is None else jax.device_get(best.scores[:, 0]).tolist()
    result = []
    for group in range(len(tokens)):
        ends = np.flatnonzero(np.isin(tokens[group, : made[group]], list(eos_ids)))
        length = int(ends[0]) + 1 if len(ends) else int(made[group])
        score = None if scores is None else scores[group]
        result.append(Generation(tokens[group, :length].tolist(), consulted[group, :length].tolist(), score))
    return result
