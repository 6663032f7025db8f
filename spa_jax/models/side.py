"""The side network g: taps -> correction. It is the personal part, and never leaves the device.

Shape letters: P taps, B batch, T length, S cache slots, D backbone width, E side width, F its feed-forward width.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spa_jax.models.block import (
    Block,
    Cache,
    CachePlacement,
    LlamaConfig,
    RMSNorm,
    place_by_position,
    rope_angles,
)

GATE_TEMPERATURE = 0.1
"""Temperature of the ladder's gates, mu = sigmoid(alpha / temperature) (Sung et al. 2022, section 3)."""

SideKind = Literal["tokenwise", "transformer"]


@dataclasses.dataclass(frozen=True)
class SideConfig:
    """Shape of a side network.

    Attributes:
        kind: `tokenwise` has no attention, so the device keeps no state; `transformer` attends over the prompt.
        width: E, the width of the ladder.
        taps: which of h_0 ... h_L it reads, ascending; at least one.
        heads: attention heads of the `transformer` kind, each of width E / heads; the other kind has none.
    """

    kind: SideKind
    width: int
    taps: tuple[int, ...]
    heads: int = 4

    @property
    def attends(self) -> bool:
        """Whether g at one position depends on the taps of earlier ones."""
        return self.kind == "transformer"

    @property
    def block(self) -> LlamaConfig:
        """The small LLaMA block of the `transformer` kind; its feed-forward width is 8/3 E, as LLaMA's is 8/3 D."""
        return LlamaConfig(
            vocab_size=0,
            hidden_size=self.width,
            intermediate_size=round(8 * self.width / 3),
            num_layers=len(self.taps),
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.width // self.heads,
        )


class TokenwiseSide(nn.Module):
    """A gated ladder of residual adapters over the taps of one position.

    s_0 = down_0(tap_0), then for each further tap
    s <- mu * s + (1 - mu) * down_p(tap_p) and s <- s + out_p(relu(in_p(s))), with `in_p` an expansion E -> D,
    and g = output(s). The gate mu is a learned scalar per tap and starts at 0.5: without one the chain learns little
    more than a constant vector.

    Attributes:
        config: width and taps.
        hidden_size: D.
        zero_output: start `output` at zero, so that g = 0 (settings where g is added to f).
        dtype: dtype of activations; parameters are float32.
    """

    config: SideConfig
    hidden_size: int
    zero_output: bool
    dtype: DTypeLike = jnp.float32

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


class Rung(nn.Module):
    """One step of the transformer ladder: the gate between the state and the tap, then a LLaMA block of width E."""

    config: LlamaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],
        state: Float[Array, "B T E"],
        layer: Int[Array, ""],
        angles: Float[Array, "B T pairs"],
        places: CachePlacement,
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        s, cache = carry
        alpha = self.param("gate", nn.initializers.zeros, ()).astype(self.dtype)
        mu = jnp.where(layer == 0, 0, jax.nn.sigmoid(alpha / GATE_TEMPERATURE)).astype(self.dtype)
        mixed = mu * s + (1 - mu) * state
        block = Block(self.config, self.dtype, kernel="xla", name="block")
        return block(mixed, cache, layer, angles, places), None


class TransformerSide(nn.Module):
    """A ladder of small LLaMA blocks (LST, Sung et al. 2022; on LLaMA QST, Zhang et al. 2024).

    s_p = block_p(mu_p * s_{p-1} + (1 - mu_p) * down_p(tap_p)) with mu_0 = 0, and g = output(norm(s_P)). It attends over
    all earlier positions, by the same rule as the backbone: a token at position p lives in cache slot p.

    Attributes:
        config: width, taps and heads.
        hidden_size: D.
        zero_output: start `output` at zero, so that g = 0 (settings where g is added to f).
        dtype: dtype of activations; parameters are float32.
    """

    config: SideConfig
    hidden_size: int
    zero_output: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        taps: Float[Array, "P B T D"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        places: CachePlacement | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config.block
        down = self.param(
            "down", nn.initializers.lecun_normal(batch_axis=0), (c.num_layers, self.hidden_size, c.hidden_size)
        )
        states = jnp.einsum("pbtd,pde->pbte", taps.astype(self.dtype), down.astype(self.dtype))
        angles, places = rope_angles(c, positions), places or place_by_position(positions, cache)
        ladder = nn.scan(
            Rung,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.dtype, name="ladder")
        layers = jnp.arange(c.num_layers, dtype=jnp.int32)
        (s, cache), _ = ladder((jnp.zeros_like(states[0]), cache), states, layers, angles, places)
        s = RMSNorm(c.rms_norm_eps, name="norm")(s)
        initializer = nn.initializers.zeros if self.zero_output else nn.initializers.lecun_normal()
        output = self.param("output", initializer, (c.hidden_size, self.hidden_size))
        return jnp.einsum("bte,ed->btd", s, output.astype(self.dtype)), cache
