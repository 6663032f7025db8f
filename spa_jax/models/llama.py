"""LLaMA, the frozen backbone f: tokens -> hidden state in front of the LM head, and the taps the side network reads.

Shape letters: B batch, T query length, S cache slots, D width, L blocks, N query heads, K key/value heads, H head
width, F feed-forward width, V vocabulary, P number of taps.

Every token carries its absolute *position*, and a token at position p lives in cache slot p. A query sees the keys at
positions up to its own, so one comparison masks both the future and cache slots not written yet. Padding has position
`PADDING`: no real token sees it and the cache has no slot for it, wherever in the row it stands. Where several
continuations share one row of a cache, `CachePlacement` say instead where tokens live and what they see.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.models.attention import attend
from spa_jax.models.compute import AUTOMATIC, Compute, Kernel
from spa_jax.models.partitioner import SINGLE_DEVICE, Partitioner
from spa_jax.models.quantized import dequantize, take_embeddings

PADDING = 2**30
"""Position of a padding token: after every real token, beyond every cache."""

Cache = dict[str, jax.Array]
"""Keys and values, `{"k": [B,L,K,H,S], "v": [B,L,K,H,S]}`, rotary embedding applied; see `spa_jax.decoding.cache`.

The slots come last because so the products of attention read them: XLA transposes nothing on a CPU.
"""

Params = dict[str, Any]

ForwardHook = Callable[[str, jax.Array, jax.Array], jax.Array]
"""(name of a layer in a block, its input, its output) -> what the block uses in place of that output.

The names are those of the linear maps, `q`, `k`, `v`, `o`, `gate`, `up` and `down`, and of the two outputs that are
added to the residual stream, `attention` and `mlp`, whose input is given as the output itself.
"""

Remat = Literal["none", "full", "dots"]
"""What blocks keep of their forward pass for the backward one: everything, their input alone, or their input and the
products with weights."""


def _keep_all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves every intermediate result except a block's weights as they are read out of the stack, whose copies would
    together be a second backbone."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "convert_element_type")


REMAT_POLICIES: dict[Remat, Callable[..., bool] | None] = {
    "none": _keep_all_but_weights,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
    """Architecture of a `LlamaForCausalLM`; the letters are the module's."""

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

    @property
    def num_params(self) -> int:
        """Number of parameters of the whole model, the LM head counted once when tied."""
        return sum(leaf.size for leaf in jax.tree.leaves(init_params(self, abstract=True)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("slots", "mask"), meta_fields=("reads_cache",))
@dataclasses.dataclass(frozen=True)
class CachePlacement:
    """Where tokens live in a cache, and which keys they see."""

    slots: Int[Array, "B T"]
    """The slot that each token is written to; one at or past the cache's S slots is not stored."""
    mask: Bool[Array, "B 1 T S"]
    """The keys that each token sees, its own among them."""
    reads_cache: bool = True
    """Whether the keys are those of the cache. Otherwise they are those of the T tokens themselves, and each token sees
    those before it: there is no cache, or it is empty."""


class LlamaOutput(NamedTuple):
    """What the backbone computes for `[B,T]` tokens."""

    hidden: Float[Array, "B T D"]
    """f: the state after the final norm, the LM head's input."""
    taps: Float[Array, "P B T D"]
    """h_0 (embedding) ... h_L (output of the last block, before the final norm), in the order asked for."""
    cache: Cache | None
    """The cache with these tokens' keys and values added; None when none was given."""


def positions_from_mask(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions 0, 1, ... of the true entries of each row, `PADDING` for the others, on whichever side they stand."""
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, PADDING)


def place_by_position(positions: Int[Array, "B T"], cache: Cache | None) -> CachePlacement:
    """Places each token in the slot of its position, where it sees all keys up to its own.

    The keys are those of the cache; without one they are those of the tokens themselves. A prompt that goes into an
    empty cache is placed without it, too: its tokens see only each other, and attention need not read the cache.
    """
    keys = positions[:, None, None, :] if cache is None else jnp.arange(cache["k"].shape[-1])[None, None, None, :]
    return CachePlacement(positions, keys <= positions[:, None, :, None], reads_cache=cache is not None)


def take_layer(stack: Any, layer: int | Int[Array, ""]) -> Any:
    """Reads one layer out of a tree whose leaves have the L layers first."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False, allow_negative_indices=False), stack
    )


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "..."], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) * scale, computed in float32 and returned in the dtype of x."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * jnp.broadcast_to(scale, x.shape).astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Float[Array, " H/2"]:
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


def rope_angles(config: LlamaConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T H/2"]:
    """Angles in radians that `rotate` turns the rotary pairs of tokens at these positions by, float32."""
    return positions.astype(jnp.float32)[:, :, None] * rope_frequencies(config)[None, None, :]


def rotate(x: Float[Array, "B T heads H"], angles: Float[Array, "B T H/2"]) -> Float[Array, "B T heads H"]:
    """Rotary position embedding (Su et al. 2021) in Hugging Face's half-split layout: pair i is (x[i], x[i + H/2])."""
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the given tokens, or over the cache after adding them to it."""

    config: LlamaConfig
    dtype: jnp.dtype
    partitioner: Partitioner = SINGLE_DEVICE
    kernel: Kernel = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "B T H/2"],
        places: CachePlacement,
        cache: Cache | None,
        layer: int | Int[Array, ""],
        hook: ForwardHook = no_hook,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config

        def heads(name: str, count: int) -> jax.Array:
            dense = nn.DenseGeneral((count, c.head_dim), use_bias=c.attention_bias, dtype=self.dtype, name=name)
            return hook(name, x, dense(x))

        q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
            cache = {
                name: cache[name].at[rows, layer, :, :, places.slots].set(new.astype(cache[name].dtype), mode="drop")
                for name, new in (("k", k), ("v", v))
            }
            if places.reads_cache:
                k, v = (
                    jnp.moveaxis(jax.lax.dynamic_index_in_dim(cache[name], layer, 1, keepdims=False), -1, 1)
                    for name in ("k", "v")
                )
        real = None if places.reads_cache else places.slots != PADDING
        k, v = k.astype(self.dtype), v.astype(self.dtype)
        mixed = attend(self.kernel, self.partitioner, q, k, v, places.mask, real)
        out = nn.DenseGeneral(c.hidden_size, axis=(-2, -1), use_bias=c.attention_bias, dtype=self.dtype, name="o")
        return hook("o", mixed, out(mixed)), cache


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    config: LlamaConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], hook: ForwardHook = no_hook) -> Float[Array, "B T D"]:
        c = self.config

        def dense(name: str, width: int, x: jax.Array) -> jax.Array:
            return hook(name, x, nn.Dense(width, use_bias=c.mlp_bias, dtype=self.dtype, name=name)(x))

        gated = nn.silu(dense("gate", c.intermediate_size, x)) * dense("up", c.intermediate_size, x)
        return dense("down", c.hidden_size, gated)


class Block(nn.Module):
    """One pre-norm block: a pure function `(h, cache) -> (h, cache)` of its parameters."""

    config: LlamaConfig
    dtype: jnp.dtype
    partitioner: Partitioner = SINGLE_DEVICE
    kernel: Kernel = "auto"

    def setup(self) -> None:
        c = self.config
        self.attention_norm, self.mlp_norm = RMSNorm(c.rms_norm_eps), RMSNorm(c.rms_norm_eps)
        self.attention = Attention(c, self.dtype, self.partitioner, self.kernel)
        self.mlp = MLP(c, self.dtype)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        cache: Cache | None,
        layer: int | Int[Array, ""],
        angles: Float[Array, "B T H/2"],
        places: CachePlacement,
        hook: ForwardHook = no_hook,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs the block on the residual stream h.

        Args:
            h: the residual stream.
            cache: of all L blocks, or None.
            layer: which of the cache's L blocks this one is.
            angles: of the rotary embedding at the tokens' positions, `rope_angles`.
            places: of the tokens in the cache.
            hook: called with "attention" and "mlp" for the outputs that are added to h, and with the names of the
                linear maps for theirs.

        Returns:
            The residual stream after the block, and the cache with the tokens' keys and values in its `layer`.
        """
        x, cache = self.attend(h, cache, layer, angles, places, hook)
        h = h + hook("attention", x, x)
        x = self.feed_forward(h, hook)
        h = h + hook("mlp", x, x)
        return self.partitioner.constrain(h, "BTD"), cache

    def attend(
        self,
        h: Float[Array, "B T D"],
        cache: Cache | None,
        layer: int | Int[Array, ""],
        angles: Float[Array, "B T H/2"],
        places: CachePlacement,
        hook: ForwardHook = no_hook,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The attention's output, to be added to h, and the cache; arguments as for the whole block."""
        return self.attention(self.attention_norm(h), angles, places, cache, layer, hook)

    def feed_forward(self, h: Float[Array, "B T D"], hook: ForwardHook = no_hook) -> Float[Array, "B T D"]:
        """The feed-forward layer's output, to be added to h."""
        return self.mlp(self.mlp_norm(h), hook)


class Embedding(nn.Module):
    """Tokens to vectors, and back to logits where the LM head is tied to them."""

    vocabulary: int
    width: int
    dtype: jnp.dtype

    def setup(self) -> None:
        initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        self.embedding = self.param("embedding", initializer, (self.vocabulary, self.width))

    def __call__(self, tokens: Int[Array, "*M"]) -> Float[Array, "*M D"]:
        return take_embeddings(self.embedding, tokens).astype(self.dtype)

    def attend(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M V"]:
        return hidden @ dequantize(self.embedding).astype(self.dtype).T


class Llama(nn.Module):
    """The backbone without sampling: `__call__` gives hidden state and taps, `logits` applies the LM head.

    Attributes:
        config: the architecture.
        taps: which of h_0 ... h_L to return, ascending.
        dtype: of activations; parameters are cast to it where they are used.
        remat: what is kept for the gradient of a `peft`.
        partitioner: how activations lie on devices.
        compute: how it computes.
    """

    config: LlamaConfig
    taps: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32
    remat: Remat = "none"
    partitioner: Partitioner = SINGLE_DEVICE
    compute: Compute = AUTOMATIC

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.dtype)
        stacked = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        self.blocks = stacked(c, self.dtype)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            dense = nn.Dense if self.compute.weights == "float" else nn.map_variables(nn.Dense, "params", dequantize)
            self.lm_head = dense(c.vocab_size, use_bias=False, dtype=self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        places: CachePlacement | None = None,
        peft: ForwardHook | None = None,
    ) -> LlamaOutput:
        """Runs tokens at their positions: all of a sequence, a prompt into an empty cache, or the next tokens.

        Args:
            tokens: token ids, int32.
            positions: absolute position of each token, int32, `PADDING` for padding.
            cache: keys and values of the tokens before.
            places: of the tokens in it; by default `place_by_position`.
            peft: what adapts the blocks, a pytree whose leaves have the L blocks first (`spa_jax.models.peft.Peft`).
        """
        h, taps, cache = self.run_blocks(self.embed_tokens(tokens), positions, cache, places, peft, taps=self.taps)
        return LlamaOutput(self.final_norm(h), taps, cache)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up h_0, the residual stream in front of the first block."""
        h = self.partitioner.constrain(self.embed(self.partitioner.constrain(tokens, "bT")), "bTd")
        return self.partitioner.constrain(h, "BTD")

    def run_blocks(
        self,
        h: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        places: CachePlacement | None = None,
        peft: ForwardHook | None = None,
        *,
        first: int | Int[Array, ""] = 0,
        last: int | Int[Array, ""] | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P B T D"], Cache | None]:
        """Runs the blocks `first`, ..., `last - 1` on the residual stream.

        Each turn of the loop reads one block's parameters out of the stack, so a range copies none of them. Bounds may
        be traced, except where a gradient is taken.

        Args:
            h: the residual stream in front of block `first`, h_first.
            positions: as for the whole model, and so are `places` and `peft`.
            cache: keys and values of all L blocks, of which those of the range are read and written.
            places: where the tokens live in the cache.
            peft: what adapts the blocks, with the leaves of all L of them.
            first: the first block that runs.
            last: the first block that does not run; by default there is none.
            taps: which of h_first, ..., h_last to return, ascending; any other h is returned as zeros.

        Returns:
            h_last, the taps in the order asked for, and the cache, None when none was given.
        """
        c = self.config
        last = c.num_layers if last is None else last
        block = Block(c, self.dtype, self.partitioner, self.compute.attention, parent=None)
        stack = self.get_variable("params", "blocks")
        angles, places = rope_angles(c, positions), places or place_by_position(positions, cache)
        if cache is not None:
            cache = {name: self.partitioner.constrain(leaf, "BLKHS") for name, leaf in cache.items()}
        slots = [taps.index(layer) if layer in taps else len(taps) for layer in range(c.num_layers + 1)]

        def keep_tap(tapped: jax.Array, layer: int | jax.Array, h: jax.Array) -> jax.Array:
            return tapped.at[jnp.array(slots, jnp.int32)[layer]].set(h, mode="drop") if taps else tapped

        @functools.partial(jax.checkpoint, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        def run_block(layer: jax.Array, h: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
            params, hook = dequantize(take_layer(stack, layer)), take_layer(peft, layer) or no_hook
            return block.apply({"params": params}, h, cache, layer, angles, places, hook)

        def turn(layer: jax.Array, carry: tuple[jax.Array, jax.Array, Cache | None]) -> Any:
            h, tapped, cache = carry
            h, cache = run_block(layer, h, cache)
            return h, keep_tap(tapped, layer + 1, h), cache

        tapped = self.partitioner.constrain(jnp.zeros((len(taps), *h.shape), h.dtype), "PBTD")
        static = isinstance(first, int) and isinstance(last, int)
        unroll = min(self.compute.unroll, max(last - first, 1)) if static else None
        return jax.lax.fori_loop(first, last, turn, (h, keep_tap(tapped, first, h), cache), unroll=unroll)

    def final_norm(self, h: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises h_L to f, the LM head's input."""
        return self.norm(h)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The frozen LM head, float32 out."""
        hidden = hidden.astype(self.dtype)
        logits = self.embed.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return logits.astype(jnp.float32)

    def touch_every_parameter(self, tokens: Int[Array, "B T"]) -> jax.Array:
        """Uses every parameter once, which is how Linen creates them."""
        h, angles = self.embed(tokens), jnp.zeros((*tokens.shape, self.config.head_dim // 2))
        self.blocks(h, None, 0, angles, place_by_position(tokens, None))
        return self.logits(self.norm(h))


def normalize_taps(
    params: Params, config: LlamaConfig, tap_list: tuple[int, ...], taps: Float[Array, "P B T D"]
) -> Float[Array, "P B T D"]:
    """Each tap by its RMS and the frozen norm weight of the block that reads it (the final norm for h_L).

    Raw taps grow 300-fold over the depth of SmolLM2; normalised they are what the next block itself works on.
    """
    scales = jnp.concatenate([params["blocks"]["attention_norm"]["scale"], params["norm"]["scale"][None]])
    return rms_norm(taps, scales[jnp.array(tap_list, jnp.int32), None, None, :], config.rms_norm_eps)


def init_params(config: LlamaConfig, seed: int = 0, abstract: bool = False) -> Params:
    """Random float32 parameters for tests and benchmarks; with `abstract`, their shapes and dtypes only."""
    model = Llama(config)

    def init() -> Params:
        variables = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32), method="touch_every_parameter")
        return variables["params"]

    return jax.eval_shape(init) if abstract else jax.jit(init)()
