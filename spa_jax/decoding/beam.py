"""Beam search, with the semantics of transformers' `generate(num_beams=K)`.

Each step ranks all continuations of a group's K hypotheses by summed log-probability. Of the first K, those that end
become finished hypotheses, whose score is divided by length ** penalty (Wu et al. 2016, simplified); the best K that do
not end go on. Shape letters: G groups (prompts), K beams, N most new tokens, V vocabulary, C candidates.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.decoding.hypotheses import IMPOSSIBLE, Finished, Hypotheses, select_active
from spa_jax.errors import UserError


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
    early_stopping: bool | Literal["never"] = False

    def check(self) -> "Beams":
        """Refuses values out of range, and returns itself.

        Raises:
            UserError: the width is below 1.
        """
        if self.width < 1:
            raise UserError(f"beams is {self.width}, but must be 1 or more")
        return self


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
    candidates = max(2, 1 + len(eos_ids)) * width  # so that K of them do not end
    count = min(candidates, logits.shape[-1])
    log_p = jax.nn.log_softmax(logits, axis=-1) + hypotheses.scores[:, :, None]
    best, ids = jax.lax.top_k(log_p, count)
    scores, index = jax.lax.top_k(best.reshape(groups, -1), min(candidates, width * count))
    parents = index // count
    token = jnp.take_along_axis(ids.reshape(groups, -1), index, axis=1).astype(jnp.int32)
    num_generated = hypotheses.num_generated + 1

    def append(history: jax.Array, new: jax.Array) -> jax.Array:
        is_next = jnp.arange(max_new_tokens)[None, None, :] == hypotheses.num_generated[:, None, None]
        return jnp.where(is_next & active[:, None, None], new[:, :, None], _take(history, parents))

    tokens = append(hypotheses.tokens, token)
    consulted = append(hypotheses.consulted, jnp.take_along_axis(consulted, parents, axis=1))
    ends = jnp.isin(token, jnp.array(eos_ids, jnp.int32)) | (num_generated == max_new_tokens)[:, None]

    continued, chosen = jax.lax.top_k(scores + jnp.where(ends, IMPOSSIBLE, 0), width)
    is_full = jnp.all(finished.scores > IMPOSSIBLE, axis=1)
    may_finish = ends & (jnp.arange(ends.shape[1])[None, :] < width)
    if beams.early_stopping is True:
        may_finish &= ~is_full[:, None]
    penalised = scores / num_generated.astype(jnp.float32)[:, None] ** beams.length_penalty
    merged = jnp.concatenate([finished.scores, jnp.where(may_finish, penalised, IMPOSSIBLE)], axis=1)
    merged, kept = jax.lax.top_k(merged, width)
    finished = Finished(
        _take(jnp.concatenate([finished.tokens, tokens], axis=1), kept),
        _take(jnp.concatenate([finished.consulted, consulted], axis=1), kept),
        merged,
    )
    length = num_generated
    if beams.early_stopping == "never" and beams.length_penalty > 0:
        length = jnp.full_like(num_generated, max_new_tokens)
    best_attainable = continued[:, 0] / length.astype(jnp.float32) ** beams.length_penalty
    is_full = jnp.all(finished.scores > IMPOSSIBLE, axis=1)
    is_done = (is_full & (best_attainable <= finished.scores[:, -1])) | (num_generated == max_new_tokens)
    if beams.early_stopping is True:
        is_done |= is_full
    parents = jnp.take_along_axis(parents, chosen, axis=1)
    tokens, consulted = _take(tokens, chosen), _take(consulted, chosen)
    extended = Hypotheses(tokens, consulted, continued, num_generated, is_done, hypotheses.keys, finished)
    unchanged = jnp.broadcast_to(jnp.arange(width, dtype=parents.dtype)[None, :], parents.shape)
    return select_active(active, extended, hypotheses), jnp.where(active[:, None], parents, unchanged)


def _take(history: Array, index: Int[Array, "G C"]) -> Array:
    """Gathers hypotheses of `[G,K,N]` by their index within the group, `[G,C,N]`."""
    return jnp.take_along_axis(history, index[:, :, None], axis=1)
