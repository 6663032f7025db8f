"""LLaMA, the frozen backbone f: tokens -> hidden state in front of the LM head, and the taps the side network reads.

The *entry* is where a correction meets the residual stream: in front of a block, or of the LM head (`head`). It divides
the backbone into a `lower` part, which knows nothing of corrections, and an `upper` part that goes on from a corrected
state. Shape letters: those of `spa_jax.models.block`, and V vocabulary, P number of taps.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spa_jax.models.block import (
    Block,
    Cache,
    CachePlacement,
    ForwardHook,
    LlamaConfig,
    RMSNorm,
    no_hook,
    place_by_position,
    rms_norm,
    rope_angles,
)
from spa_jax.models.compute import AUTOMATIC, Compute
from spa_jax.models.partitioner import SINGLE_DEVICE, Partitioner
from spa_jax.models.product import PRODUCT, product
from spa_jax.models.quantized import dequantize, take_embeddings

Params = dict[str, Any]

Entry = int | Literal["head"]
"""Where corrections enter: in front of the block of that index, or after the final norm, in front of the LM head."""

Remat = Literal["none", "full", "dots"]
"""Rematerialisation: for the backward pass blocks keep everything, their input alone (`full`), or their input and the
products with weights (`dots`)."""


def _keep_all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves every intermediate result except a block's weights as they are read out of the stack, whose copies would
    together be a second backbone."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "convert_element_type")


REMAT_POLICIES: dict[Remat, Callable[..., bool] | None] = {
    "none": _keep_all_but_weights,
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(PRODUCT)
    ),
}


class LlamaOutput(NamedTuple):
    """The backbone's outputs for `[B,T]` tokens."""

    hidden: Float[Array, "B T D"]
    """f: the state after the final norm, the LM head's input."""
    taps: Float[Array, "P B T D"]
    """h_0 (embedding) ... h_L (output of the last block, before the final norm), in the order asked for."""
    cache: Cache | None
    """The cache with these tokens' keys and values added; None when none was given."""


def take_layer(stack: Any, layer: int | Int[Array, ""], axis: int = 0) -> Any:
    """Reads one layer out of a tree whose leaves have the layers on an axis, by default the first."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, axis, keepdims=False, allow_negative_indices=False),
        stack,
    )


class Embedding(nn.Module):
    """Tokens to vectors, and back to logits where the LM head is tied to them."""

    vocabulary: int
    width: int
    weights_dtype: DTypeLike
    activation_dtype: DTypeLike

    def setup(self) -> None:
        initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        self.embedding = self.param("embedding", initializer, (self.vocabulary, self.width))

    def __call__(self, tokens: Int[Array, "*M"]) -> Float[Array, "*M D"]:
        return take_embeddings(self.embedding, tokens).astype(self.activation_dtype)

    def attend(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M V"]:
        return product(hidden, dequantize(self.embedding).astype(self.weights_dtype), transposed=True, out=jnp.float32)


class Head(nn.Module):
    """An LM head that is not tied to the embedding."""

    vocabulary: int
    weights_dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M V"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (hidden.shape[-1], self.vocabulary))
        return product(hidden, dequantize(kernel).astype(self.weights_dtype), out=jnp.float32)


class Llama(nn.Module):
    """The backbone without sampling: `__call__` gives hidden state and taps, `logits` applies the LM head.

    Attributes:
        config: the architecture.
        taps: which of h_0 ... h_L the whole model returns, ascending.
        dtype: dtype in which weights are multiplied; parameters are cast to it where they are used.
        remat: what blocks keep for a gradient.
        partitioner: where activations lie on devices.
        compute: kernels, unrolling, and the precision of weights.
        entry: where `lower` ends and `upper` begins.
    """

    config: LlamaConfig
    taps: tuple[int, ...] = ()
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    partitioner: Partitioner = SINGLE_DEVICE
    compute: Compute = AUTOMATIC
    entry: Entry = "head"

    @property
    def activation_dtype(self) -> DTypeLike:
        """Dtype of activations, keys and values: that of products, but float32 on a CPU, where half precision is
        slower for all else."""
        return jnp.float32 if self.partitioner.platform == "cpu" else self.dtype

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.dtype, self.activation_dtype)
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
            self.lm_head = Head(c.vocab_size, self.dtype)

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
            places: where the tokens live in the cache and what they see; by default `place_by_position`.
            peft: adapts the blocks' outputs: a pytree whose leaves have the L blocks first, `spa_jax.models.peft.Peft`.
        """
        state, taps, cache = self.lower(tokens, positions, cache, places, peft)
        hidden, cache = self.upper(state, positions, cache, places, peft)
        return LlamaOutput(hidden, taps, cache)

    def lower(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        places: CachePlacement | None = None,
        peft: ForwardHook | None = None,
        when: Bool[Array, ""] | None = None,
        entry: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P B T D"], Cache | None]:
        """Runs tokens up to the entry; other arguments as for the whole.

        Args:
            when: where given and false, no block runs, and the results mean nothing.
            entry: a traced entry in place of the model's own, L for `head`.

        Returns:
            The state at the entry, the taps, and the cache with the keys and values of the blocks before the entry.
        """
        depth = entry_depth(self, entry)
        last = depth if when is None else jnp.where(when, jnp.asarray(depth, jnp.int32), 0)
        h = self.embed_tokens(tokens)
        h, taps, cache = self.run_blocks(h, positions, cache, places, peft, last=last, taps=self.taps)
        return self.at_entry(h, entry), taps, cache

    def upper(
        self,
        state: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        places: CachePlacement | None = None,
        peft: ForwardHook | None = None,
        context: Cache | None = None,
        entry: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Goes on from states at the entry; other arguments as for `lower` and `run_blocks`.

        Returns:
            f, which at `head` is the state itself, and the cache with the keys and values of the blocks that ran.
        """
        depth = entry_depth(self, entry)
        if entry is None and self.entry == "head":
            return state, cache
        h, _, cache = self.run_blocks(state, positions, cache, places, peft, first=depth, context=context)
        return choose_at_head(self, entry, lambda: state, lambda: self.final_norm(h)), cache

    def at_entry(self, h: Float[Array, "*M D"], entry: Int[Array, ""] | None = None) -> Float[Array, "*M D"]:
        """Computes the state at the entry from the residual stream in front of it."""
        return choose_at_head(self, entry, lambda: self.final_norm(h), lambda: h)

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
        context: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P B T D"], Cache | None]:
        """Runs the blocks `first`, ..., `last - 1` on the residual stream.

        The loop over them reads one block's parameters at a time out of the stack, so a range copies none of them.
        Bounds may be traced, except where a gradient is taken.

        Args:
            h: the residual stream in front of the block `first`, h_first.
            positions: absolute position of each token, int32, `PADDING` for padding.
            cache: keys and values of the tokens before, of all blocks or the last ones; those of the range are read
                and written.
            places: where the tokens live in the cache and what they see; by default `place_by_position`.
            peft: adapts the blocks' outputs: a pytree whose leaves have all L blocks first.
            first: the first block that runs.
            last: the first block after it that does not run; by default L.
            taps: which of h_0 ... h_L to return, ascending; those outside h_first ... h_last are returned as zeros.
            context: keys and values `[B,L',K,H,C]` of other tokens, of the last L' blocks, which are read in front of
                the tokens' own and never written; `places` then has a mask of C + T keys, and there is no cache.

        Returns:
            h_last, the taps in the order asked for, and the cache, None when none was given.
        """
        c = self.config
        last = c.num_layers if last is None else last
        block = Block(c, self.dtype, self.partitioner, self.compute.attention, parent=None)
        stack = self.get_variable("params", "blocks")
        angles, places = rope_angles(c, positions), places or place_by_position(positions, cache)
        if cache is not None:
            axes = "BLKHS" if cache["k"].ndim == 5 else "LSKH"
            cache = {name: self.partitioner.constrain(leaf, axes) for name, leaf in cache.items()}
        slots = [taps.index(layer) if layer in taps else len(taps) for layer in range(c.num_layers + 1)]

        def index_in(kept: Cache | None, layer: jax.Array) -> jax.Array:
            """Returns a block's index in a cache of the last blocks."""
            return layer if kept is None else layer - (c.num_layers - kept["k"].shape[-4])

        def keep_tap(tapped: jax.Array, layer: int | jax.Array, h: jax.Array) -> jax.Array:
            return tapped.at[jnp.array(slots, jnp.int32)[layer]].set(h, mode="drop") if taps else tapped

        @functools.partial(jax.checkpoint, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        def run_block(layer: jax.Array, h: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
            params, hook = dequantize(take_layer(stack, layer)), take_layer(peft, layer) or no_hook
            read = None if context is None else take_layer(context, index_in(context, layer), axis=1)
            return block.apply({"params": params}, h, cache, index_in(cache, layer), angles, places, hook, read)

        def turn(layer: jax.Array, carry: tuple[jax.Array, jax.Array, Cache | None]) -> Any:
            h, tapped, cache = carry
            h, cache = run_block(layer, h, cache)
            return h, keep_tap(tapped, layer + 1, h), cache

        tapped = self.partitioner.constrain(jnp.zeros((len(taps), *h.shape), h.dtype), "PBTD")
        unroll = None
        if isinstance(first, int) and isinstance(last, int):
            unroll = min(self.compute.unroll, max(last - first, 1))
        return jax.lax.fori_loop(first, last, turn, (h, keep_tap(tapped, first, h), cache), unroll=unroll)

    def final_norm(self, h: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises h_L to f, the LM head's input."""
        return self.norm(h)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Applies the frozen LM head; float32."""
        return self.embed.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def touch_every_parameter(self, tokens: Int[Array, "B T"]) -> jax.Array:
        """Uses every parameter once, which is how Linen creates them."""
        h, angles = self.embed(tokens), jnp.zeros((*tokens.shape, self.config.head_dim // 2))
        self.blocks(h, None, 0, angles, place_by_position(tokens, None))
        return self.logits(self.norm(h))


def entry_depth(model: Llama, entry: Int[Array, ""] | None = None) -> int | Int[Array, ""]:
    """Counts the blocks before the model's entry, or before a traced one."""
    if entry is not None:
        return entry
    return model.config.num_layers if model.entry == "head" else model.entry


def choose_at_head(
    model: Llama, entry: Int[Array, ""] | None, at_head: Callable[[], jax.Array], inside: Callable[[], jax.Array]
) -> jax.Array:
    """Computes one thing where the model's entry is `head` and another in front of a block, or either by a traced
    entry."""
    if entry is None:
        return at_head() if model.entry == "head" else inside()
    return jnp.where(entry == model.config.num_layers, at_head(), inside())


def normalize_taps(
    params: Params, config: LlamaConfig, tap_list: tuple[int, ...], taps: Float[Array, "P B T D"]
) -> Float[Array, "P B T D"]:
    """Normalises each tap by its RMS and the frozen norm weight of the block that reads it (the final norm for h_L).

    Raw taps grow 300-fold over the depth of SmolLM2; normalised they are what the next block itself works on.
    """
    scales = jnp.concatenate([params["blocks"]["attention_norm"]["scale"], params["norm"]["scale"][None]])
    return rms_norm(taps, scales[jnp.array(tap_list, jnp.int32), None, None, :], config.rms_norm_eps)


def normalize_state(
    params: Params, model: Llama, state: Float[Array, "... D"], entry: Int[Array, ""] | None = None
) -> Float[Array, "... D"]:
    """Normalises a state at the entry as its tap is, for the router; at `head` it is f, which is normalised already."""

    def normed() -> jax.Array:
        scale = params["blocks"]["attention_norm"]["scale"][entry_depth(model, entry)]
        return rms_norm(state, scale.reshape(*[1] * (state.ndim - 1), -1), model.config.rms_norm_eps)

    return choose_at_head(model, entry, lambda: state, normed)


def unit(model: Llama, state: Float[Array, "... D"], entry: Int[Array, ""] | None = None) -> Float[Array, "... #D"]:
    """Computes the unit of a correction at each state: its RMS in front of a block, and 1 at `head`."""

    def rms() -> jax.Array:
        square = jnp.mean(jnp.square(state.astype(jnp.float32)), axis=-1, keepdims=True)
        return jnp.sqrt(square + model.config.rms_norm_eps).astype(state.dtype)

    return choose_at_head(model, entry, lambda: jnp.ones((*state.shape[:-1], 1), state.dtype), rms)


def init_params(config: LlamaConfig, seed: int = 0, abstract: bool = False) -> Params:
    """Makes random float32 parameters for tests and benchmarks; with `abstract`, their shapes and dtypes only."""
    return _init.eval_shape(config, seed) if abstract else _init(config, seed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(config: LlamaConfig, seed: int) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Llama(config).init(jax.random.key(seed), tokens, method="touch_every_parameter")["params"]
