"""The side network g: taps -> correction. It is the personal part, and never leaves the device.

Shape letters: P taps, B batch, T length, D backbone width, E side width.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GATE_TEMPERATURE = 0.1
"""Of the ladder's gates, mu = sigmoid(alpha / temperature) (Sung et al. 2022, section 3)."""


@dataclasses.dataclass(frozen=True)
class SideConfig:
    """Shape of a side network.

    Attributes:
        kind: `tokenwise` has no attention, so the device keeps no state.
        width: E.
        taps: which of h_0 ... h_L it reads, ascending; at least one.
    """

    kind: Literal["tokenwise"]
    width: int
    taps: tuple[int, ...]


class TokenwiseSide(nn.Module):
    """A gated ladder of residual adapters over the taps of one position.

    s_0 = down_0(tap_0), then for each further tap
    s <- mu * s + (1 - mu) * down_p(tap_p) and s <- s + out_p(relu(in_p(s))), with `in_p` an expansion E -> D,
    and g = output(s). The gate mu is a learned scalar per tap and starts at 0.5: without one the chain learns little
    more than a constant vector (DESIGN.md, trial 1).

    Attributes:
        config: width and taps.
        hidden_size: D.
        zero_output: start `output` at zero, so that g = 0 (settings where g is added to f).
        dtype: of activations; parameters are float32.
    """

    config: SideConfig
    hidden_size: int
    zero_output: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, taps: Float[Array, "P B T D"]) -> Float[Array, "B T D"]:
        d, e, further = self.hidden_size, self.config.width, len(self.config.taps) - 1
        dense = nn.initializers.lecun_normal(batch_axis=0)
        zeros = nn.initializers.zeros
        down = self.param("down", dense, (further + 1, d, e))
        adapters = {}
        if further:  # neither initialisers nor checkpoints take arrays without elements
            adapters = {
                "alpha": self.param("gate", zeros, (further,)),
                "in": self.param("adapter_in", dense, (further, e, d)),
                "in_bias": self.param("adapter_in_bias", zeros, (further, d)),
                "out": self.param("adapter_out", dense, (further, d, e)),
                "out_bias": self.param("adapter_out_bias", zeros, (further, e)),
            }
        output = self.param("output", zeros if self.zero_output else nn.initializers.lecun_normal(), (e, d))

        down, adapters, output = jax.tree.map(lambda w: w.astype(self.dtype), (down, adapters, output))
        states = jnp.einsum("pbtd,pde->pbte", taps.astype(self.dtype), down)

        def climb(s: jax.Array, rung: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[jax.Array, None]:
            state, w = rung
            mu = jax.nn.sigmoid(w["alpha"] / GATE_TEMPERATURE)
            s = mu * s + (1 - mu) * state
            wide = jax.nn.relu(jnp.einsum("bte,ed->btd", s, w["in"]) + w["in_bias"][None, None, :])
            return s + jnp.einsum("btd,de->bte", wide, w["out"]) + w["out_bias"][None, None, :], None

        s = states[0]
        if further:
            s, _ = jax.lax.scan(climb, s, (states[1:], adapters))
        return jnp.einsum("bte,ed->btd", s, output)
