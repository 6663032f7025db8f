"""Beam search, with the semantics of transformers' `generate(num_beams=K)`.

Each step ranks all continuations of a group's K hypotheses by summed log-probability. Of the first K, those that end
become finished hypotheses, whose score is divided by length ** penalty (Wu et al. 2016, simplified); the best K that do
not end go on. Shape letters: G groups (prompts), K beams, N most new tokens, V vocabulary, C candidates.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spa_jax.decoding.hypotheses import IMPOSSIBLE, Finished, Hypotheses, is_end, select_active
from spa_jax.errors import UserError

EarlyStopping = bool | Literal["never"]
STOPPINGS: tuple[EarlyStopping, ...] = (False, True, "never")
MAX_LENGTH_PENALTY = 8.0
"""The largest exponent of a length either way, so that its power is finite in float32."""


@dataclasses.dataclass(frozen=True)
class Beams:
    """The width of a beam search, and when it stops.

    Attributes:
        width: hypotheses that are kept of each prompt, K.
        length_penalty: exponent of the length that divides a finished hypothesis' score: above 0 longer ones are
            favoured, since scores are negative; 0 for none.
        early_stopping: True stops a group at its Kth finished hypothesis. False stops when the best unfinished one, at
            its present length, is worse than all K finished; "never" when it could not become better at any length.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def check(self) -> "Beams":
        """Refuses values out of range, and returns itself.

        Raises:
            UserError: the width is below 1, or the length penalty too large either way.
        """
        if self.width < 1:
            raise UserError(f"beams is {self.width}, but must be 1 or more")
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise UserError(
                f"length_penalty is {self.length_penalty}, but must be between {-MAX_LENGTH_PENALTY} and "
                f"{MAX_LENGTH_PENALTY}"
            )
        return self


class Search(NamedTuple):
    """How each group is searched; it may be traced, so that changing it compiles nothing."""

    width: Int[Array, " G"]
    """Hypotheses that are kept, at most K; further ones are never possible."""
    length_penalty: Float[Array, " G"]
    stopping: Int[Array, " G"]
    """Index of `early_stopping` in `STOPPINGS`."""


def searches(beams: Sequence[Beams]) -> Search:
    """Makes the `Search` of groups from how each is searched."""
    ways: Any = (
        np.array([each.width for each in beams], np.int32),
        np.array([each.length_penalty for each in beams], np.float32),
        np.array([STOPPINGS.index(each.early_stopping) for each in beams], np.int32),
    )
    return Search(*ways)


class Ranking(NamedTuple):
    """Continuations of each group's hypotheses by one more token, ranked."""

    parents: Int[Array, "G K"]
    """For each hypothesis that goes on, best first, the index within its group of the one it continues."""
    tokens: Int[Array, "G K"]
    """Its new token."""
    scores: Float[Array, "G K"]
    """Its summed log-probability."""
    ended_parents: Int[Array, "G K"]
    """The first K continuations, as above; those among them that end have finished."""
    ended_tokens: Int[Array, "G K"]
    kept: Int[Array, "G K"]
    """The finished hypotheses from now on, by index among those before, followed by the first K continuations."""
    finished_scores: Float[Array, "G K"]
    """Their scores, `IMPOSSIBLE` where there is none yet."""
    is_done: Bool[Array, " G"]


def rank(
    search: Search,
    scores: Float[Array, "G K"],
    finished_scores: Float[Array, "G K"],
    logits: Float[Array, "G K V"],
    num_generated: Int[Array, " G"],
    limit: Int[Array, " G"],
    eos_ids: Int[Array, "#G E"],
) -> Ranking:
    """Ranks all continuations of each group's hypotheses by one token.

    Args:
        search: how to search.
        scores: summed log-probabilities of the hypotheses, `IMPOSSIBLE` where there is none.
        finished_scores: of the finished ones, likewise.
        logits: float32, of the next token after each hypothesis.
        num_generated: tokens of each hypothesis, the next one included.
        limit: most new tokens.
        eos_ids: tokens that end a hypothesis, and padding below 0.
    """
    groups, width = scores.shape
    exists = jnp.arange(width)[None, :] < search.width[:, None]
    candidates = max(2, 1 + eos_ids.shape[1]) * width  # so that K of them do not end
    count = min(candidates, logits.shape[-1])
    log_p = jax.nn.log_softmax(logits, axis=-1) + scores[:, :, None]
    best, ids = jax.lax.top_k(log_p, count)
    ranked, index = jax.lax.top_k(best.reshape(groups, -1), min(candidates, width * count))
    parents = index // count
    tokens = jnp.take_along_axis(ids.reshape(groups, -1), index, axis=1).astype(jnp.int32)
    ends = is_end(tokens, eos_ids[:, None, :]) | (num_generated == limit)[:, None]

    def over_length(scores: jax.Array, length: jax.Array) -> jax.Array:
        return scores / (length.astype(jnp.float32) ** search.length_penalty)[:, None]

    def is_full(finished: jax.Array) -> jax.Array:
        return jnp.all((finished > IMPOSSIBLE) | ~exists, axis=1)

    continued, chosen = jax.lax.top_k(ranked + jnp.where(ends, IMPOSSIBLE, 0), width)
    stops_early = search.stopping == STOPPINGS.index(True)
    may_finish = ends[:, :width] & exists & ~(stops_early & is_full(finished_scores))[:, None]
    ended = jnp.where(may_finish, over_length(ranked[:, :width], num_generated), IMPOSSIBLE)
    finished, kept = jax.lax.top_k(jnp.concatenate([finished_scores, ended], axis=1), width)
    finished = jnp.where(exists, finished, IMPOSSIBLE)
    waits_longest = (search.stopping == STOPPINGS.index("never")) & (search.length_penalty > 0)
    attainable = over_length(continued, jnp.where(waits_longest, limit, num_generated))[:, 0]
    worst = jnp.take_along_axis(finished, search.width[:, None] - 1, axis=1)[:, 0]
    is_done = is_full(finished) & ((attainable <= worst) | stops_early)
    return Ranking(
        jnp.take_along_axis(parents, chosen, axis=1),
        jnp.take_along_axis(tokens, chosen, axis=1),
        jnp.where(exists, continued, IMPOSSIBLE),
        parents[:, :width],
        tokens[:, :width],
        kept,
        finished,
        is_done | (num_generated == limit),
    )


def search_step(
    beams: Beams,
    hypotheses: Hypotheses,
    logits: Float[Array, "G K V"],
    consulted: Bool[Array, "G K"],
    active: Bool[Array, " G"],
    eos_ids: Sequence[int],
) -> tuple[Hypotheses, Int[Array, "G K"]]:
    """Adds one token to the hypotheses of the active groups.

    Args:
        beams: how to search.
        hypotheses: the present ones, made by `init_hypotheses(..., search=True)`.
        logits: float32, of the next token after each hypothesis.
        consulted: whether the device was asked for that token.
        active: groups to extend; the others stay as they are.
        eos_ids: tokens that end a hypothesis.

    Returns:
        The new hypotheses, and for each the index within its group of the one it continues.
    """
    finished = hypotheses.finished
    assert finished is not None, "made without search"
    groups, width, max_new_tokens = hypotheses.tokens.shape
    num_generated = hypotheses.num_generated + 1
    search = searches([beams] * groups)
    limit, ends = jnp.full(groups, max_new_tokens, jnp.int32), jnp.array(eos_ids, jnp.int32)[None, :]
    ranking = rank(search, hypotheses.scores, finished.scores, logits, num_generated, limit, ends)
    is_next = jnp.arange(max_new_tokens)[None, None, :] == hypotheses.num_generated[:, None, None]

    def extend(parents: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        flags = jnp.take_along_axis(consulted, parents, axis=1)
        return (
            jnp.where(is_next, tokens[:, :, None], _take(hypotheses.tokens, parents)),
            jnp.where(is_next, flags[:, :, None], _take(hypotheses.consulted, parents)),
        )

    ended = extend(ranking.ended_parents, ranking.ended_tokens)
    before = finished.tokens, finished.consulted
    kept, flags = (_take(jnp.concatenate(both, axis=1), ranking.kept) for both in zip(before, ended))
    extended = Hypotheses(
        *extend(ranking.parents, ranking.tokens), ranking.scores, num_generated, ranking.is_done, hypotheses.keys,
        Finished(kept, flags, ranking.finished_scores),
    )  # fmt: skip
    unchanged = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], ranking.parents.shape)
    return select_active(active, extended, hypotheses), jnp.where(active[:, None], ranking.parents, unchanged)


def _take(history: Array, index: Int[Array, "G C"]) -> Array:
    """Gathers hypotheses of `[G,K,N]` by their index within the group, `[G,C,N]`."""
    return jnp.take_along_axis(history, index[:, :, None], axis=1)
