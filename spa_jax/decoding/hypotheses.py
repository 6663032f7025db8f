"""The state of a generation's choices, whether they are made by sampling or by beam search.

A *group* is one prompt with its K hypotheses (one when sampling); groups are independent of each other. Shape letters:
G groups, K hypotheses of a group, N most new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

IMPOSSIBLE = -1e9
"""Score of a hypothesis that does not exist."""


class Finished(NamedTuple):
    """The best hypotheses of beam search that have ended, best first."""

    tokens: Int[Array, "G K N"]
    consulted: Bool[Array, "G K N"]
    scores: Float[Array, "G K"]
    """Summed log-probabilities over length ** penalty; `IMPOSSIBLE` where there is none yet."""


class Hypotheses(NamedTuple):
    """New tokens of all groups; the group is the first axis of every leaf."""

    tokens: Int[Array, "G K N"]
    """New tokens; only the first `num_generated` are set, and those after an EOS mean nothing."""
    consulted: Bool[Array, "G K N"]
    """True where the device was asked for the token."""
    scores: Float[Array, "G K"]
    """Summed log-probabilities in nats, best first; beam search only."""
    num_generated: Int[Array, " G"]
    """New tokens so far, the same for all hypotheses of a group."""
    is_done: Bool[Array, " G"]
    """True where nothing more is generated."""
    keys: Key[Array, " G"]
    """Random keys: each token is drawn by its group's key and its index, so groups do not depend on their company."""
    finished: Finished | None
    """Ended hypotheses of beam search; None when sampling."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of one prompt, EOS included where it was reached, and for each whether the device was asked."""

    tokens: list[int]
    consulted: list[bool]
    score: float | None = None
    """Summed log-probabilities in nats over length ** penalty; beam search only."""
    p_consult: Sequence[float] = dataclasses.field(default=(), compare=False)
    """p(consult) of each token; nothing where no router decides, or where it was not noted."""
    logprobs: Sequence[float] = dataclasses.field(default=(), compare=False)
    """Log-probability of each token in nats, before temperature and penalties, NaN where it is not known."""
    waits: Sequence[float] = dataclasses.field(default=(), compare=False)
    """Seconds that the question about each token was out; 0 where none was."""

    def first(self, count: int) -> "Generation":
        """Returns its first tokens."""
        if count >= len(self.tokens):
            return self
        return dataclasses.replace(
            self,
            tokens=self.tokens[:count],
            consulted=self.consulted[:count],
            p_consult=self.p_consult[:count],
            logprobs=self.logprobs[:count],
            waits=self.waits[:count],
        )

    @property
    def consulted_share(self) -> float:
        """Share of the tokens, EOS included, for which the device was asked."""
        return sum(self.consulted) / max(len(self.consulted), 1)


def init_hypotheses(groups: int, width: int, max_new_tokens: int, seed: int | jax.Array, search: bool) -> Hypotheses:
    """Creates hypotheses without tokens; with `search` for a beam search, whose first choice fans out from one
    hypothesis."""
    tokens = jnp.zeros((groups, width, max_new_tokens), jnp.int32)
    consulted = jnp.zeros(tokens.shape, bool)
    scores = jnp.where(jnp.arange(width) == 0, 0.0, IMPOSSIBLE)
    scores = jnp.broadcast_to(scores[None, :], (groups, width))
    keys = group_keys(seed, groups)
    finished = Finished(tokens, consulted, jnp.full((groups, width), IMPOSSIBLE)) if search else None
    return Hypotheses(tokens, consulted, scores, jnp.zeros(groups, jnp.int32), jnp.zeros(groups, bool), keys, finished)


def group_keys(seed: int | jax.Array, groups: int) -> Key[Array, " G"]:
    """Derives a random key for each group from the seed and its index in the batch alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(groups))


def token_keys(keys: Key[Array, " G"], index: Int[Array, " G"]) -> Key[Array, " G"]:
    """Derives from each group's key the one that its new token of this index is drawn by."""
    return jax.vmap(jax.random.fold_in)(keys, index)


def last_tokens(hypotheses: Hypotheses) -> Int[Array, "G K"]:
    """Returns the newest token of each hypothesis; every group needs at least one."""
    index = jnp.maximum(hypotheses.num_generated - 1, 0)
    return jnp.take_along_axis(hypotheses.tokens, index[:, None, None], axis=2)[:, :, 0]


def is_end(tokens: Int[Array, "*M"], eos_ids: Int[Array, "*#M E"]) -> Bool[Array, "*M"]:
    """Tells which tokens are among those that end a text, where padding of `eos_ids` is below 0."""
    return jnp.any(tokens[..., None] == eos_ids, axis=-1)


def parent_rows(parents: Int[Array, "G K"]) -> Int[Array, " R"]:
    """Converts indices of hypotheses within their group to indices among all R = G K rows."""
    groups, width = parents.shape
    return (parents + width * jnp.arange(groups, dtype=parents.dtype)[:, None]).reshape(-1)


def select_active(active: Bool[Array, " G"], new: Hypotheses, old: Hypotheses) -> Hypotheses:
    """Takes `new` for active groups and `old` for the others."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def to_generations(hypotheses: Hypotheses, eos_ids: Sequence[int]) -> list[Generation]:
    """Fetches the best hypothesis of each group from the device."""
    best = hypotheses.finished or hypotheses
    fetched = jax.device_get((best.tokens, best.consulted, best.scores, hypotheses.num_generated))
    tokens, consulted, scores, num_generated = *(array[:, 0] for array in fetched[:3]), fetched[3]
    result = []
    for group in range(len(tokens)):
        ends = np.flatnonzero(np.isin(tokens[group, : num_generated[group]], list(eos_ids)))
        length = int(ends[0]) + 1 if len(ends) else int(num_generated[group])
        score = None if hypotheses.finished is None else scores[group].item()
        result.append(Generation(tokens[group, :length].tolist(), consulted[group, :length].tolist(), score))
    return result
