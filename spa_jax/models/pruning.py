"""A transformer side network that starts as a pruned copy of the backbone (Sung et al. 2022, section 3.2).

Structural pruning by weight magnitude (Li et al. 2017): whole units are kept, those with the largest summed absolute
weights. Kept in ascending order, so that pruning to full size is a copy. Shape letters: L backbone blocks, D width,
N query heads, K key/value heads, H head width, F feed-forward width; E side width, P rungs of the ladder.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig, rope_frequencies
from spa_jax.models.llama import Params
from spa_jax.models.quantized import dequantize
from spa_jax.models.side import SideConfig


@functools.partial(jax.jit, static_argnums=(0, 1))
def prune(side: SideConfig, config: LlamaConfig, frozen: Params, fresh: Params) -> Params:
    """Takes a side network's blocks and down-projections from the backbone.

    The rung of tap h_t starts as block t, which reads h_t (the last block for h_L). All rungs keep the same E of the D
    directions of the residual stream, and `down` starts by picking them; each rung keeps its own heads, value
    directions and feed-forward units. Of a query's or key's rotary pairs those that turn most nearly as fast as the
    small head's are kept. Gates, final norm and output projection stay as they are in `fresh`.

    Args:
        side: shape of the side network, of the transformer kind.
        config: architecture of the backbone.
        frozen: parameters of the backbone.
        fresh: parameters of the side network, float32.

    Raises:
        UserError: the side network's block is larger than the backbone's in some direction.
    """
    small = side.block
    for name in ("hidden_size", "num_heads", "head_dim", "intermediate_size"):
        if getattr(small, name) > getattr(config, name):
            raise UserError(
                f"side.init=pruned cannot take {name} {getattr(small, name)} from a backbone with "
                f"{getattr(config, name)}: make side.width smaller, change side.heads, or set side.init=random"
            )
    blocks = jnp.minimum(jnp.array(side.taps), config.num_layers - 1)
    every = _weights(dequantize(frozen["blocks"]))
    channels = _largest(_channel_sizes(every), small.hidden_size)
    pairs = _nearest_pairs(small, config)
    groups = config.num_heads // config.num_kv_heads

    def rung(block: Int[Array, ""]) -> Params:
        w = {name: kernel[block].astype(jnp.float32) for name, kernel in every.items()}
        sizes = jnp.abs(w["q"]).sum((0, 2)) + jnp.abs(w["o"]).sum((1, 2))
        heads = _largest(sizes, small.num_heads)
        q, o = w["q"][channels][:, heads], w["o"][heads][..., channels]
        k, v = (w[name][channels][:, heads // groups] for name in ("k", "v"))
        values = _largest(jnp.abs(v).sum(0) + jnp.abs(o).sum(2), small.head_dim)
        pick = jax.vmap(lambda kernel, kept: kernel[:, kept], (1, 0), 1)
        units = jnp.abs(w["gate"]).sum(0) + jnp.abs(w["up"]).sum(0) + jnp.abs(w["down"]).sum(1)
        units = _largest(units, small.intermediate_size)
        return {
            "attention": {
                "q": {"kernel": q[:, :, pairs]},
                "k": {"kernel": k[:, :, pairs]},
                "v": {"kernel": pick(v, values)},
                "o": {"kernel": jnp.take_along_axis(o, values[:, :, None], axis=1)},
            },
            "attention_norm": {"scale": jnp.ones(small.hidden_size)},  # taps bring the backbone's scale
            "mlp": {
                "gate": {"kernel": w["gate"][channels][:, units]},
                "up": {"kernel": w["up"][channels][:, units]},
                "down": {"kernel": w["down"][units][:, channels]},
            },
            "mlp_norm": {"scale": frozen["blocks"]["mlp_norm"]["scale"][block][channels].astype(jnp.float32)},
        }

    picked = jnp.zeros((config.hidden_size, small.hidden_size)).at[channels, jnp.arange(small.hidden_size)].set(1)
    return {
        **fresh,
        "down": jnp.broadcast_to(picked[None], (len(side.taps), *picked.shape)),
        "ladder": {**fresh["ladder"], "block": jax.lax.map(rung, blocks)},
    }


def _weights(blocks: Params) -> dict[str, Float[Array, "L ..."]]:
    kernels = {name: blocks["attention"][name]["kernel"] for name in ("q", "k", "v", "o")}
    return kernels | {name: blocks["mlp"][name]["kernel"] for name in ("gate", "up", "down")}


def _channel_sizes(weights: dict[str, Float[Array, "L ..."]]) -> Float[Array, " D"]:
    """Sums the absolute weights of all blocks that read or write each direction of the residual stream."""
    written = [jnp.abs(weights[name]).sum(range(weights[name].ndim - 1)) for name in ("o", "down")]
    read = [jnp.abs(weights[name]).sum((0, *range(2, weights[name].ndim))) for name in ("q", "k", "v", "gate", "up")]
    return sum(written + read, jnp.float32(0))


def _largest(sizes: Float[Array, "... n"], count: int) -> Int[Array, "... count"]:
    """Returns the indices of the `count` largest sizes, ascending."""
    return jnp.sort(jax.lax.top_k(sizes, count)[1], axis=-1)


def _nearest_pairs(small: LlamaConfig, config: LlamaConfig) -> Int[Array, " h"]:
    """Selects the components of a backbone's head that make up a small one, in the half-split layout."""
    unscaled = dataclasses.replace(config, rope_scaling=None)
    wide, narrow = (jnp.log(rope_frequencies(c)) for c in (unscaled, small))
    nearest = jnp.argmin(jnp.abs(narrow[:, None] - wide[None, :]), axis=1)
    return jnp.concatenate([nearest, nearest + config.head_dim // 2])
