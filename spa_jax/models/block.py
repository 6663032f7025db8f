"""One block of LLaMA: attention and feed-forward layer, each behind a norm and added to the residual stream.

A block is a pure function `(h, cache) -> (h, cache)` of its parameters. `spa_jax.models.llama` runs ranges of the
backbone's, and `spa_jax.models.side` a ladder of small ones. Shape letters: B batch, T query length, S cache slots, D
width, L blocks, N query heads, K key/value heads, H head width, F feed-forward width.

Every token carries its absolute *position*, and a token at position p lives in cache slot p. A query sees the keys at
positions up to its own, so one comparison masks both the future and cache slots not written yet. Padding has position
`PADDING`: no real token sees it and the cache has no slot for it, wherever in the row it stands. Where several
continuations share one row of a cache, `CachePlacement` says instead where tokens live and what they see.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spa_jax.models.attention import attend, attend_shared
from spa_jax.models.compute import Kernel
from spa_jax.models.partitioner import SINGLE_DEVICE, Partitioner
from spa_jax.models.product import linear

PADDING = 2**30
"""Position of a padding token: after every real token, beyond every cache."""

Cache = dict[str, jax.Array]
"""Keys and values, `{"k": [B,L,K,H,S], "v": [B,L,K,H,S]}`, or `[L,S,K,H]` where all rows share the slots; rotary
embedding applied; see `spa_jax.decoding.cache`.

Slots of a row come last because so the products of attention read them: XLA transposes nothing on a CPU. Shared slots
are many, and a processor writes a token's keys much faster where they lie together.
"""

ForwardHook = Callable[[str, jax.Array, jax.Array], jax.Array]
"""(name of a layer in a block, its input, its output) -> what the block uses in place of that output.

The names are those of the linear maps, `q`, `k`, `v`, `o`, `gate`, `up` and `down`, and of the two outputs that are
added to the residual stream, `attention` and `mlp`, whose input is given as the output itself.
"""


def no_hook(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The `ForwardHook` that leaves every output as it is."""
    return y


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rescaling of rotary frequencies for contexts longer than those of pre-training.

    `linear` (Chen et al. 2023) divides every frequency by `factor`; `llama3` (Llama Team 2024) divides the low ones,
    keeps the high ones and interpolates between, measured against `original_max_position_embeddings` tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a `LlamaForCausalLM`, or of a Mistral, Qwen2 or Qwen3, which are LLaMA but for a detail; the
    letters are the module's."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    qkv_bias: bool = False
    """Biases of queries, keys and values, and none of the output (Qwen2); `attention_bias` has all four."""
    qk_norm: bool = False
    """Norms of each head's queries and keys, in front of their rotary embedding (Qwen3)."""

    @property
    def num_params(self) -> int:
        """Number of parameters of the whole model, the LM head counted once when tied."""
        d, f, queries, keys = self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads
        attention = 2 * d * (queries + keys) * self.head_dim
        if self.attention_bias or self.qkv_bias:
            attention += (queries + 2 * keys) * self.head_dim + (d if self.attention_bias else 0)
        if self.qk_norm:
            attention += 2 * self.head_dim
        mlp = 3 * d * f + (2 * f + d if self.mlp_bias else 0)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * d
        return embeddings + self.num_layers * (attention + mlp + 2 * d) + d


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("slots", "mask", "begins"), meta_fields=("reads_cache",)
)
@dataclasses.dataclass(frozen=True)
class CachePlacement:
    """Where tokens live in a cache, and which keys they see."""

    slots: Int[Array, "B T"]
    """The slot that each token is written to; one at or past the cache's S slots is not stored."""
    mask: Bool[Array, "B 1 T S"]
    """The keys that each token sees, its own among them."""
    reads_cache: bool = True
    """Whether the keys are those of the cache. Otherwise they are those of the T tokens themselves, each of which
    sees all up to itself: there is no cache, or it is empty."""
    begins: Int[Array, " B"] | None = None
    """In a cache whose slots all rows share, the first of those that each row's mask is about."""


def positions_from_mask(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers the true entries of each row 0, 1, ..., wherever they stand; the others get `PADDING`."""
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, PADDING)


def prompt_positions(lengths: Int[Array | np.ndarray, " B"], longest: int) -> Int[Array, "B T"]:
    """Numbers the tokens of rows that are padded on the right to `longest` tokens; padding gets `PADDING`."""
    return positions_from_mask(jnp.arange(longest, dtype=jnp.int32)[None, :] < lengths[:, None])


def place_by_position(positions: Int[Array, "B T"], cache: Cache | None) -> CachePlacement:
    """Places each token in the slot of its position, where it sees all keys up to its own.

    The keys are those of the cache; without one they are those of the tokens themselves. A prompt that goes into an
    empty cache is placed without it, too: its tokens see only each other, and attention need not read the cache.
    """
    keys = positions[:, None, None, :] if cache is None else jnp.arange(cache["k"].shape[-1])[None, None, None, :]
    return CachePlacement(positions, keys <= positions[:, None, :, None], reads_cache=cache is not None)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "..."], eps: float) -> Float[Array, "... D"]:
    """Computes x / rms(x) * scale in float32; returns the dtype of x."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * jnp.broadcast_to(scale, x.shape).astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Float[Array, " pairs"]:
    """Angular frequency of each rotary pair in radians per position, float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rope_angles(config: LlamaConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T pairs"]:
    """Angles in radians that `rotate` turns the rotary pairs of tokens at these positions by, float32."""
    return positions.astype(jnp.float32)[:, :, None] * rope_frequencies(config)[None, None, :]


def rotate(x: Float[Array, "B T heads H"], angles: Float[Array, "B T H/2"]) -> Float[Array, "B T heads H"]:
    """Rotary position embedding (Su et al. 2021) in Hugging Face's half-split layout: pair i is (x[i], x[i + H/2])."""
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the given tokens, or over the cache after adding them to it."""

    config: LlamaConfig
    weights_dtype: DTypeLike
    partitioner: Partitioner = SINGLE_DEVICE
    kernel: Kernel = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "B T pairs"],
        places: CachePlacement,
        cache: Cache | None,
        layer: int | Int[Array, ""],
        hook: ForwardHook = no_hook,
        context: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config

        def heads(name: str, count: int) -> jax.Array:
            use_bias = c.attention_bias or c.qkv_bias
            layer = linear((count, c.head_dim), weights_dtype=self.weights_dtype, use_bias=use_bias, name=name)
            return hook(name, x, layer(x))

        q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.rms_norm_eps, name="q_norm")(q), RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None and places.begins is not None:
            cache = {
                name: cache[name].at[layer, places.slots].set(_finite(new.astype(cache[name].dtype)), mode="drop")
                for name, new in (("k", k), ("v", v))
            }
            mixed = attend_shared(self.partitioner, q, cache["k"], cache["v"], layer, places.begins, places.mask)
        else:
            mixed, cache = self._attend(q, k, v, places, cache, layer, context)
        out = linear(c.hidden_size, weights_dtype=self.weights_dtype, use_bias=c.attention_bias, axes=2, name="o")
        return hook("o", mixed, out(mixed)), cache

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        places: CachePlacement,
        cache: Cache | None,
        layer: int | Int[Array, ""],
        context: Cache | None,
    ) -> tuple[Float[Array, "B T N H"], Cache | None]:
        """Attends over the tokens' own keys, behind a context if there is one, or over each row's cache."""
        if cache is not None:
            rows = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
            cache = {
                name: cache[name].at[rows, layer, :, :, places.slots].set(new.astype(cache[name].dtype), mode="drop")
                for name, new in (("k", k), ("v", v))
            }
            if places.reads_cache:
                k, v = (
                    jnp.moveaxis(jax.lax.dynamic_index_in_dim(cache[name], layer, 1, keepdims=False), -1, 1)
                    for name in ("k", "v")
                )
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        if context is not None:
            k, v = (
                jnp.concatenate([jnp.moveaxis(context[name], -1, 1).astype(q.dtype), own], axis=1)
                for name, own in (("k", k), ("v", v))
            )
        not_padding = None if places.reads_cache or context is not None else places.slots != PADDING
        return attend(self.kernel, self.partitioner, q, k, v, places.mask, not_padding), cache


def _finite(x: jax.Array) -> jax.Array:
    """Puts 0 in place of what is not finite. In slots that rows share, it would spoil rows that do not see it: a
    weight of 0 times infinity is no number."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    config: LlamaConfig
    weights_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], hook: ForwardHook = no_hook) -> Float[Array, "B T D"]:
        c = self.config

        def dense(name: str, width: int, x: jax.Array) -> jax.Array:
            layer = linear(width, weights_dtype=self.weights_dtype, use_bias=c.mlp_bias, name=name)
            return hook(name, x, layer(x))

        gated = nn.silu(dense("gate", c.intermediate_size, x)) * dense("up", c.intermediate_size, x)
        return dense("down", c.hidden_size, gated)


class Block(nn.Module):
    """One pre-norm block: a pure function `(h, cache) -> (h, cache)` of its parameters."""

    config: LlamaConfig
    weights_dtype: DTypeLike
    partitioner: Partitioner = SINGLE_DEVICE
    kernel: Kernel = "auto"

    def setup(self) -> None:
        c = self.config
        self.attention_norm, self.mlp_norm = RMSNorm(c.rms_norm_eps), RMSNorm(c.rms_norm_eps)
        self.attention = Attention(c, self.weights_dtype, self.partitioner, self.kernel)
        self.mlp = MLP(c, self.weights_dtype)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        cache: Cache | None,
        layer: int | Int[Array, ""],
        angles: Float[Array, "B T pairs"],
        places: CachePlacement,
        hook: ForwardHook = no_hook,
        context: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs the block.

        Args:
            h: the residual stream.
            cache: keys and values of all L blocks; without one the tokens see only each other.
            layer: this block's index in the cache.
            angles: of the tokens' rotary embedding, by `rope_angles`.
            places: where the tokens live in the cache and what they see.
            hook: replaces outputs within the block.
            context: keys and values `[B,K,H,C]` of other tokens, which are read in front of the tokens' own; the mask
                of `places` then has C + T keys.

        Returns:
            The residual stream after the block, and the cache with the tokens' keys and values added.
        """
        x, cache = self.attend(h, cache, layer, angles, places, hook, context)
        h = h + hook("attention", x, x)
        x = self.feed_forward(h, hook)
        h = h + hook("mlp", x, x)
        return self.partitioner.constrain(h, "BTD"), cache

    def attend(
        self,
        h: Float[Array, "B T D"],
        cache: Cache | None,
        layer: int | Int[Array, ""],
        angles: Float[Array, "B T pairs"],
        places: CachePlacement,
        hook: ForwardHook = no_hook,
        context: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Computes the attention's output, which is not added to h yet; arguments and cache as for the whole block."""
        return self.attention(self.attention_norm(h), angles, places, cache, layer, hook, context)

    def feed_forward(self, h: Float[Array, "B T D"], hook: ForwardHook = no_hook) -> Float[Array, "B T D"]:
        """Computes the feed-forward layer's output, which is not added to h yet."""
        return self.mlp(self.mlp_norm(h), hook)
