"""Sampling: the next token greedily, or by temperature within the top k and the top p.

Shape letters: B rows, G groups of one hypothesis each, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from spa_jax.decoding.hypotheses import Hypotheses, is_end, select_active, token_keys
from spa_jax.errors import UserError


class Sampling(NamedTuple):
    """The parameters of sampling, of all rows or each an array of rows; they may be traced, so that changing them
    compiles nothing.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: choose among the k likeliest tokens; 0 is all.
        top_p: choose among the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020); 1 is all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> "Sampling":
        """Refuses values out of range, and returns itself.

        Raises:
            UserError: a value is out of range; the message names it.
        """
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, but must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        return self


class Penalties(NamedTuple):
    """Penalties that are taken off the logits of tokens that an answer has already, as OpenAI's API defines it.

    Of all rows, or each an array of rows; negative values favour such tokens.

    Attributes:
        frequency: for each time that the answer has the token.
        presence: once, if the answer has it at all.
    """

    frequency: float = 0.0
    presence: float = 0.0

    def check(self) -> "Penalties":
        """Refuses values out of range, and returns itself.

        Raises:
            UserError: a value is out of range; the message names it.
        """
        for name, value in self._asdict().items():
            if not -2 <= value <= 2:
                raise UserError(f"{name}_penalty is {value}, but must be between -2 and 2")
        return self


GREEDY, NO_PENALTIES = Sampling(), Penalties()


def penalize(logits: Float[Array, "B V"], counts: Int[Array, "B V"], penalties: Penalties) -> Float[Array, "B V"]:
    """Takes the penalties of each row off the logits of tokens, by how often its answer has them."""
    frequency, presence = (jnp.asarray(leaf)[:, None] for leaf in penalties)
    said = (counts > 0).astype(logits.dtype)
    return logits - frequency * counts.astype(logits.dtype) - presence * said


def filter_logits(
    logits: Float[Array, "B V"], top_k: Int[Array, " #B"], top_p: Float[Array, " #B"]
) -> Float[Array, "B V"]:
    """Sets logits outside the top k or the top p to -inf; the likeliest token always stays."""
    top_k, top_p = top_k[:, None], top_p[:, None]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    rank = jnp.arange(logits.shape[-1])[None, :]
    kept = ((before < top_p) | (top_p == 1)) & ((rank < top_k) | (top_k == 0))
    kept = kept.at[:, 0].set(True)
    lowest_kept = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest_kept, logits, -jnp.inf)


def sample(keys: Key[Array, " B"], logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    """Draws one token id a row, int32, each by its own key."""
    temperature, top_k, top_p = (jnp.atleast_1d(jnp.asarray(leaf)) for leaf in sampling)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        filtered = filter_logits(logits / jnp.maximum(temperature, 1e-6)[:, None], top_k, top_p)
        drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
        return jnp.where(temperature == 0, greedy, drawn)

    return jax.lax.cond(jnp.all(temperature == 0), lambda: greedy, draw)


def sample_step(
    sampling: Sampling,
    hypotheses: Hypotheses,
    logits: Float[Array, "G 1 V"],
    consulted: Bool[Array, "G 1"],
    active: Bool[Array, " G"],
    eos_ids: Sequence[int],
) -> tuple[Hypotheses, Int[Array, "G 1"]]:
    """Adds a sampled token to the active groups, which have one hypothesis each; arguments and results as for
    `beam.search_step`."""
    token = sample(token_keys(hypotheses.keys, hypotheses.num_generated), logits[:, 0], sampling)
    return append_token(hypotheses, token, consulted, active, eos_ids), jnp.zeros(consulted.shape, jnp.int32)


def append_token(
    hypotheses: Hypotheses,
    token: Int[Array, " G"],
    consulted: Bool[Array, "G 1"],
    active: Bool[Array, " G"],
    eos_ids: Sequence[int],
) -> Hypotheses:
    """Adds given tokens to the active groups, which have one hypothesis each; arguments as for `sample_step`."""
    max_new_tokens = hypotheses.tokens.shape[2]
    is_next = jnp.arange(max_new_tokens)[None, None, :] == hypotheses.num_generated[:, None, None]
    num_generated = hypotheses.num_generated + 1
    extended = hypotheses._replace(
        tokens=jnp.where(is_next, token[:, None, None], hypotheses.tokens),
        consulted=jnp.where(is_next, consulted[:, :, None], hypotheses.consulted),
        num_generated=num_generated,
        is_done=is_end(token, jnp.array(eos_ids, jnp.int32)[None, :]) | (num_generated == max_new_tokens),
    )
    return select_active(active, extended, hypotheses)
