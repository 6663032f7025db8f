"""The state that goes on from the entry in each setting: f, corrected by g (equation 1 and section 5.4 of the paper).

At the entry `head` f is the LM head's input. In front of an inner block it is the residual stream, and g and the
router's offset are given here multiplied by their unit, see `spa_jax.models.llama.unit`.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spa_jax.choices import Setting

ROUTED: tuple[Setting, ...] = ("spa", "s2")
"""Settings with a router."""
ADDED: tuple[Setting, ...] = ("spa", "s1")
"""Settings where g is added to f; in the others it replaces f."""
Edits = Literal["targets", "all"]
"""The positions that are corrected in front of an inner block: those that predict an answer's tokens, or the prompt's
too. With `targets` a token sees the backbone's own keys and values of everything before the answer it is in. With `all`
the whole prompt is corrected at once, and a router decides about new tokens alone, unless its threshold is 1 and the
device is never asked."""


def with_correction(setting: Setting, f: Float[Array, "... D"], g: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Computes the state that goes on where the device is asked."""
    return f + g.astype(f.dtype) if setting in ADDED else g.astype(f.dtype)


def combine(
    setting: Setting,
    f: Float[Array, "... D"],
    g: Float[Array, "... D"],
    sigma: Bool[Array, "..."],
    offset: Float[Array, "... D"] | None = None,
) -> Float[Array, "... D"]:
    """Computes the state that goes on: corrected by g where sigma is true, and `without_correction` elsewhere.

    `base` ignores g and sigma; `s1` and `s3` are corrected everywhere.
    """
    if setting == "base":
        return f
    consulted = with_correction(setting, f, g)
    return jnp.where(sigma[..., None], consulted, without_correction(f, offset)) if setting in ROUTED else consulted


def without_correction(f: Float[Array, "... D"], offset: Float[Array, "... D"] | None) -> Float[Array, "... D"]:
    """Computes the state that goes on where the device is not asked: f, or f plus the router's learned `offset`."""
    return f if offset is None else f + jnp.broadcast_to(offset, f.shape).astype(f.dtype)


def mix(setting: Setting, f: Float[Array, "... D"], g: Float[Array, "... D"], share: Float[Array, "..."]) -> Array:
    """Computes `combine` of a routed setting with a number from 0 to 1 in place of sigma; `[..., D]`."""
    share = share[..., None].astype(f.dtype)
    return f + share * g.astype(f.dtype) if setting in ADDED else (1 - share) * f + share * g.astype(f.dtype)
