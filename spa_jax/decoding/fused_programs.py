"""The jitted programs of `FusedModel`, over a static `FusedConfig`.

`prefill` runs the prompts, `choose_first_token` chooses from what they gave, and `decode` loops over further tokens.
All take the parameters of the backbone, `frozen`, and those of the method, `trainable`. The `threshold` is the
p(consult) above which the device is asked; without `beams` they sample.

Shape letters: G groups (prompts), U of them that are not the beginning of another one, K hypotheses of each, R = G K
rows, T prompt tokens, S cache slots, N most new tokens, P taps, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

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
from spa_jax.models.block import PADDING, Cache, CachePlacement, place_by_position, prompt_positions
from spa_jax.models.combine import ROUTED, Setting, combine
from spa_jax.models.llama import Llama, Params, normalize_state, normalize_taps, unit
from spa_jax.models.method import Method
from spa_jax.models.plugin import PluginConfig, correction, offset_of, router_logits
from spa_jax.models.router import consult


@dataclasses.dataclass(frozen=True)
class FusedConfig:
    """The static argument of the programs: they are compiled once for all plugins of one shape.

    Attributes:
        model: the backbone's program, with the taps that the side network reads.
        method: what adapts the backbone; None for the backbone alone.
        setting: what goes on from the entry, or the name of a method within the blocks.
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
        """Whether there is a side network that attends."""
        return self.plugin is not None and self.plugin.side.attends

    @property
    def corrects_prompt(self) -> bool:
        """Whether the prompt's tokens are corrected too."""
        return self.plugin is not None and self.plugin.edits == "all"

    @property
    def reads_prompt(self) -> bool:
        """Whether the side network reads the taps of all the prompt's tokens."""
        return self.attends or self.corrects_prompt


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
    positions = prompt_positions(prompts.run_lengths, tokens.shape[1])
    cache = init_cache(config.model.config, len(tokens), slots, config.model.activation_dtype)
    backbone, places = _backbone(config, frozen, trainable), place_by_position(positions, None)
    states, taps, cache = backbone(tokens, positions, cache, places, method="lower")
    rows, last = prompts.rows, prompts.lengths - 1
    if not config.corrects_prompt:
        _, cache = backbone(states, positions, cache, places, method="upper")
        states = states[rows, last][:, None]
    taps = taps if config.reads_prompt else taps[:, rows, last][:, :, None]
    return PromptState(states, taps, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3, static_argnames=("slots", "max_new_tokens", "beams"))
def choose_first_token(
    config: FusedConfig,
    frozen: Params,
    trainable: Params,
    cache: Cache,
    states: Float[Array, "B M D"],
    taps: Float[Array, "P C N D"],
    prompts: PromptBatch,
    seed: Int[Array, ""],
    sampling: Sampling,
    threshold: Float[Array, ""],
    *,
    slots: int,
    max_new_tokens: int,
    beams: Beams | None,
) -> tuple[Hypotheses, tuple[Cache, Cache | None]]:
    """Chooses the first new token of each prompt, from the parts of its `PromptState`; the cache is donated.

    It has G prompts, or U where the prompts' tokens are corrected too; the side network's always has U.

    Returns:
        The hypotheses, and the caches of the backbone and of a side network that attends.
    """
    side_cache = None
    rows, last = jnp.asarray(prompts.rows), jnp.asarray(prompts.lengths) - 1
    positions = prompt_positions(prompts.run_lengths, taps.shape[2]) if config.reads_prompt else last[:, None]
    if config.plugin is not None and config.attends:
        side_cache = init_cache(config.plugin.side.block, len(positions), slots, config.model.activation_dtype)
    g, side_cache = _correct(config, frozen, trainable, taps, positions, side_cache)
    if config.reads_prompt and not config.corrects_prompt:
        g, positions = g[rows, last][:, None], last[:, None]
    states, sigma = _enter(config, frozen, trainable, states, g, threshold, is_prompt=config.corrects_prompt)
    places = place_by_position(positions, None) if config.corrects_prompt else None
    hidden, cache = _backbone(config, frozen, trainable)(states, positions, cache, places, method="upper")
    if config.corrects_prompt:
        hidden, sigma = hidden[rows, last][:, None], sigma[rows, last][:, None]
    groups, width = len(prompts.lengths), beams.width if beams else 1
    hypotheses = init_hypotheses(groups, width, max_new_tokens, seed, search=beams is not None)
    hypotheses, _ = choose_next_token(
        config.model, frozen, hidden[:, 0], sigma[:, 0], hypotheses, jnp.ones(groups, bool), sampling, beams,
        config.eos_ids,
    )  # fmt: skip
    return hypotheses, (cache, side_cache)


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

    backbone = _backbone(config, frozen, trainable)

    def is_active(s: DecodeState) -> jax.Array:
        return (s.hypotheses.num_generated < target_length) & ~s.hypotheses.is_done

    def step(s: DecodeState) -> DecodeState:
        active = is_active(s)
        tokens = last_tokens(s.hypotheses)
        positions = jnp.broadcast_to(jnp.where(active, s.position, PADDING)[:, None], tokens.shape)
        places, slot_mask = place_newest(s.slot_mask, s.position, s.hypotheses.num_generated, active)
        states, taps, cache = backbone(tokens, positions, s.cache, places, method="lower")
        g, side_cache = _correct(config, frozen, trainable, taps, positions, s.side_cache, places)
        states, sigma = _enter(config, frozen, trainable, states, g, threshold)
        hidden, cache = backbone(states, positions, cache, places, method="upper")
        hypotheses, parents = choose_next_token(
            config.model, frozen, hidden.reshape(-1, hidden.shape[-1]), sigma.reshape(-1), s.hypotheses, active,
            sampling, beams, config.eos_ids,
        )  # fmt: skip
        slot_mask = take_rows(slot_mask, parent_rows(parents))
        return DecodeState(cache, side_cache, slot_mask, s.position + active.astype(jnp.int32), hypotheses)

    return jax.lax.while_loop(lambda s: jnp.sum(is_active(s)) > min_active, step, state)


def _backbone(config: FusedConfig, frozen: Params, trainable: Params) -> Callable[..., Any]:
    """Binds the backbone's program to its parameters and to what the method adds to its blocks; `method` is `lower` or
    `upper`, as of `Llama`."""
    adapter = None if config.method is None else config.method.block_adapter(trainable)
    return functools.partial(config.model.apply, {"params": frozen}, peft=adapter)


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
        return jnp.zeros((*positions.shape, model.config.hidden_size), model.activation_dtype), side_cache
    taps = normalize_taps(frozen, model.config, model.taps, taps)
    return correction(config.plugin, trainable, taps, positions, side_cache, model.activation_dtype, places)


def _enter(
    config: FusedConfig,
    frozen: Params,
    trainable: Params,
    states: Float[Array, "B T D"],
    g: Float[Array, "B T D"],
    threshold: Float[Array, ""],
    is_prompt: bool = False,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
    """Corrects the states at the entry.

    Args:
        config: what the program is compiled for.
        frozen: the backbone's parameters.
        trainable: the method's.
        states: uncorrected.
        g: of the side network, in units of the entry.
        threshold: p(consult) above which the device is asked.
        is_prompt: whether these are all tokens of prompts, which are corrected together.

    Returns:
        The corrected states, and sigma.
    """
    if config.setting in ROUTED and is_prompt:
        sigma = jnp.broadcast_to(threshold < 1, states.shape[:2])
    elif config.setting in ROUTED:
        sigma = consult(router_logits(trainable, normalize_state(frozen, config.model, states)), threshold)
    else:
        sigma = jnp.full(states.shape[:2], config.setting != "base")
    if config.plugin is None:
        return states, sigma
    size, offset = unit(config.model, states), offset_of(trainable)
    if offset is not None:
        offset = size * offset.astype(size.dtype)[None, None, :]
    return combine(cast(Setting, config.setting), states, size * g, sigma, offset), sigma


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
