"""The jitted programs of `FusedModel`, over a static `FusedConfig`.

`prefill` runs the prompts, `choose_first_token` chooses from what they gave, and `decode` loops over further tokens.
All take the parameters of the backbone, `frozen`, and those of the method, `trainable`. The `threshold` is the
p(consult) above which the device is asked; without `beams` they sample.

Shape letters: G groups (prompts), U of them that are not the beginning of another one, K hypotheses of each, R = G K
rows, T prompt tokens, S cache slots, N most new tokens, P taps, D width.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.cache import init_cache, place_newest, take_rows
from spa_jax.decoding.hypotheses import Hypotheses, init_hypotheses, last_tokens, parent_rows
from spa_jax.decoding.next_token import choose_next_token
from spa_jax.decoding.prompt_store import PromptState
from spa_jax.decoding.sampling import Sampling
from spa_jax.models.block import PADDING, Cache, CachePlacement, place_by_position, positions_from_mask
from spa_jax.models.combine import ROUTED, Setting, combine
from spa_jax.models.llama import Llama, LlamaOutput, Params, normalize_taps
from spa_jax.models.method import Method
from spa_jax.models.plugin import PluginConfig, correction, offset_of, router_logits
from spa_jax.models.router import consult


@dataclasses.dataclass(frozen=True)
class FusedConfig:
    """The static argument of the programs: they are compiled once for all plugins of one shape.

    Attributes:
        model: the backbone's program, with the taps that the side network reads.
        method: what adapts the backbone; None for the backbone alone.
        setting: what enters the LM head, or the name of a method within the blocks.
        eos_ids: tokens that end a generation.
    """

    model: Llama
    method: Method | None
    setting: str
    eos_ids: tuple[int, ...]

    @property
    def plugin(self) -> PluginConfig | None:
        """The method, if it has a side network."""
        return None if self.method is None or self.method.side is None else cast(PluginConfig, self.method)

    @property
    def attends(self) -> bool:
        """Whether there is a side network that attends, and so reads the taps of all tokens."""
        return self.plugin is not None and self.plugin.side.attends


class PromptBatch(NamedTuple):
    """G prompts, of which only U are run: the others are beginnings of those."""

    tokens: Int[np.ndarray, "U T"]
    run_lengths: Int[np.ndarray, " U"]
    """Tokens of the prompts that are run."""
    rows: Int[np.ndarray, " G"]
    """For each prompt, the row of `tokens` that it is in."""
    lengths: Int[np.ndarray, " G"]
    """Tokens of each prompt."""


class DecodeState(NamedTuple):
    """A generation under way; every leaf has the batch first."""

    cache: Cache
    side_cache: Cache | None
    """Keys and values of a side network that attends."""
    slot_mask: Bool[Array, "R S"]
    """The slots that each hypothesis attends to, in both caches."""
    position: Int[Array, " G"]
    """Where the newest token will be run."""
    hypotheses: Hypotheses


@functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
def prefill(config: FusedConfig, frozen: Params, trainable: Params, prompts: PromptBatch, *, slots: int) -> PromptState:
    """Runs the prompts into a cache of so many slots."""
    tokens = jnp.asarray(prompts.tokens)
    mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < prompts.run_lengths[:, None]
    positions = positions_from_mask(mask)
    cache = init_cache(config.model.config, len(tokens), slots, config.model.dtype)
    out = _run_backbone(config, frozen, trainable, tokens, positions, cache, place_by_position(positions, None))
    rows, last = prompts.rows, prompts.lengths - 1
    taps = out.taps if config.attends else out.taps[:, rows, last][:, :, None]
    return PromptState(out.hidden[rows, last], taps, _not_none(out.cache))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "max_new_tokens", "beams"))
def choose_first_token(
    config: FusedConfig,
    frozen: Params,
    trainable: Params,
    hidden: Float[Array, "G D"],
    taps: Float[Array, "P B M D"],
    prompts: PromptBatch,
    seed: Int[Array, ""],
    sampling: Sampling,
    threshold: Float[Array, ""],
    *,
    slots: int,
    max_new_tokens: int,
    beams: Beams | None,
) -> tuple[Hypotheses, Cache | None]:
    """Chooses the first new token of each prompt, from the `hidden` and the `taps` of its `PromptState`.

    Returns:
        The hypotheses, and the cache of U prompts of a side network that attends.
    """
    side_cache = None
    if config.plugin is not None and config.attends:
        mask = jnp.arange(taps.shape[2], dtype=jnp.int32)[None, :] < prompts.run_lengths[:, None]
        side_cache = init_cache(config.plugin.side.block, len(mask), slots, config.model.dtype)
        g, side_cache = _correct(config, frozen, trainable, taps, positions_from_mask(mask), side_cache)
        g = g[prompts.rows, prompts.lengths - 1]
    else:
        g, _ = _correct(config, frozen, trainable, taps, jnp.asarray(prompts.lengths)[:, None] - 1, None)
        g = g[:, 0]
    groups, width = len(prompts.lengths), beams.width if beams else 1
    hypotheses = init_hypotheses(groups, width, max_new_tokens, seed, search=beams is not None)
    active = jnp.ones(groups, bool)
    hypotheses, _ = _choose(config, frozen, trainable, hidden, g, hypotheses, active, sampling, beams, threshold)
    return hypotheses, side_cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="beams", donate_argnums=3)
def decode(
    config: FusedConfig,
    frozen: Params,
    trainable: Params,
    state: DecodeState,
    sampling: Sampling,
    threshold: Float[Array, ""],
    target_length: Int[Array, ""],
    min_active: Int[Array, ""],
    *,
    beams: Beams | None,
) -> DecodeState:
    """Generates in one loop until each group is done or has `target_length` new tokens, or until no more than
    `min_active` groups are left to go on; the state is donated."""

    def is_active(s: DecodeState) -> jax.Array:
        return (s.hypotheses.num_generated < target_length) & ~s.hypotheses.is_done

    def step(s: DecodeState) -> DecodeState:
        active = is_active(s)
        tokens = last_tokens(s.hypotheses)
        positions = jnp.broadcast_to(jnp.where(active, s.position, PADDING)[:, None], tokens.shape)
        places, slot_mask = place_newest(s.slot_mask, s.position, s.hypotheses.num_generated, active)
        out = _run_backbone(config, frozen, trainable, tokens, positions, s.cache, places)
        g, side_cache = _correct(config, frozen, trainable, out.taps, positions, s.side_cache, places)
        hidden, g = (x.reshape(-1, x.shape[-1]) for x in (out.hidden, g))
        hypotheses, parents = _choose(
            config, frozen, trainable, hidden, g, s.hypotheses, active, sampling, beams, threshold
        )
        slot_mask = take_rows(slot_mask, parent_rows(parents))
        return DecodeState(
            _not_none(out.cache), side_cache, slot_mask, s.position + active.astype(jnp.int32), hypotheses
        )

    return jax.lax.while_loop(lambda s: jnp.sum(is_active(s)) > min_active, step, state)


def _run_backbone(
    config: FusedConfig,
    frozen: Params,
    trainable: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    places: CachePlacement,
) -> LlamaOutput:
    """Runs tokens through the backbone, with what the method adds to its blocks."""
    adapter = None if config.method is None else config.method.block_adapter(trainable)
    return config.model.apply({"params": frozen}, tokens, positions, cache, places, adapter)


def _correct(
    config: FusedConfig,
    frozen: Params,
    trainable: Params,
    taps: Float[Array, "P B M D"],
    positions: Int[Array, "B M"],
    side_cache: Cache | None,
    places: CachePlacement | None = None,
) -> tuple[Float[Array, "B M D"], Cache | None]:
    """Runs the side network on these tokens: g, which is 0 if there is none, and the side network's cache."""
    model = config.model
    if config.plugin is None:
        return jnp.zeros((*positions.shape, model.config.hidden_size), model.dtype), side_cache
    taps = normalize_taps(frozen, model.config, model.taps, taps)
    return correction(config.plugin, trainable, taps, positions, side_cache, model.dtype, places)


def _choose(
    config: FusedConfig,
    frozen: Params,
    trainable: Params,
    hidden: Float[Array, "B D"],
    g: Float[Array, "B D"],
    hypotheses: Hypotheses,
    active: Bool[Array, " G"],
    sampling: Sampling,
    beams: Beams | None,
    threshold: Float[Array, ""],
) -> tuple[Hypotheses, Int[Array, "G K"]]:
    """Adds one token to the active groups; there are B = G rows after the prompt, and B = R later."""
    if config.setting in ROUTED:
        sigma = consult(router_logits(trainable, hidden), threshold)
    else:
        sigma = jnp.full(hidden.shape[:1], config.setting != "base")
    head_input = hidden
    if config.plugin is not None:
        head_input = combine(cast(Setting, config.setting), hidden, g, sigma, offset_of(trainable))
    return choose_next_token(
        config.model, frozen, head_input, sigma, hypotheses, active, sampling, beams, config.eos_ids
    )


def _not_none(cache: Cache | None) -> Cache:
    assert cache is not None
    return cache


@functools.partial(jax.jit, donate_argnums=0)
def end_groups(state: DecodeState, first: Int[Array, ""]) -> DecodeState:
    """Marks the groups from `first` on as done."""
    hypotheses = state.hypotheses
    is_done = hypotheses.is_done | (jnp.arange(len(hypotheses.is_done)) >= first)
    return state._replace(hypotheses=hypotheses._replace(is_done=is_done))


@jax.jit
def take_groups(state: DecodeState, groups: Int[Array, " H"]) -> DecodeState:
    """Narrows a generation to some of its groups."""
    by_group = state.slot_mask.reshape(len(state.position), -1, state.slot_mask.shape[-1])
    state = take_rows(state._replace(slot_mask=by_group), groups)
    return state._replace(slot_mask=state.slot_mask.reshape(-1, state.slot_mask.shape[-1]))
