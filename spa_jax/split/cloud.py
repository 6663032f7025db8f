"""The cloud's jitted programs: backbone, router, LM head and the hypotheses. They never hold a side parameter.

A session is one generation of G prompts with K hypotheses each, R = G K independent rows. Tokens run up to the entry,
and the router decides; while no token needs the device the cloud goes on by itself. Where one does, its group *waits*:
taps go down, g comes back, and the rest of the backbone goes on from the corrected state, or from the uncorrected one
when nothing comes.

Shape letters: G groups (prompts), K hypotheses, R = G K rows, T prompt tokens, N most new tokens, D width, P taps,
C positions whose taps are kept until they are sent (all new ones for a side network that attends, else the last).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.cache import init_cache, place_newest, prompt_slot_mask, take_rows
from spa_jax.decoding.hypotheses import IMPOSSIBLE, Hypotheses, init_hypotheses, last_tokens, parent_rows
from spa_jax.decoding.next_token import choose_next_token
from spa_jax.decoding.sampling import Sampling, append_token
from spa_jax.models.block import PADDING, Cache, CachePlacement, place_by_position, prompt_positions
from spa_jax.models.combine import ROUTED, Setting, with_correction, without_correction
from spa_jax.models.llama import Llama, Params, normalize_state, normalize_taps, unit
from spa_jax.models.router import consult
from spa_jax.split import wire
from spa_jax.split.wire import Codec, Encoded, ReplyMode


@dataclasses.dataclass(frozen=True)
class CloudConfig:
    """The static argument of the programs.

    Attributes:
        model: the backbone's program, with the taps that the side network reads.
        setting: what goes on from the entry.
        codec: how numbers travel.
        attends: whether the side network attends, and so reads the taps of all tokens.
        reply: what the device answers with.
        beams: how to search; None to sample.
        eos_ids: tokens that end a generation.
        corrects_prompt: whether the prompts' tokens are corrected too, before the first new one.
    """

    model: Llama
    setting: Setting
    codec: Codec
    attends: bool
    reply: ReplyMode
    beams: Beams | None
    eos_ids: tuple[int, ...]
    corrects_prompt: bool = False

    @property
    def width(self) -> int:
        """Hypotheses of each prompt, K."""
        return self.beams.width if self.beams else 1


class RouterState(NamedTuple):
    """The routers that devices sent; every group has its own."""

    kernel: Float[Array, "G D 2"]
    threshold: Float[Array, " G"]
    offset: Float[Array, "G D"]
    """Zero where a router has none."""


class CloudState(NamedTuple):
    """Sessions under way; every leaf has the batch first."""

    cache: Cache
    slot_mask: Bool[Array, "R S"]
    """The cache slots that each hypothesis attends to."""
    position: Int[Array, " G"]
    """Where the newest token will be run."""
    last_prompt_position: Int[Array, " G"]
    """Position of the last prompt token, the first whose correction may be asked for."""
    hypotheses: Hypotheses
    router: RouterState
    states: Float[Array, "R D"]
    """The newest token's state at the entry, from which the next token is chosen."""
    consulted: Bool[Array, " R"]
    """Whether the device is asked for that token."""
    waiting: Bool[Array, " G"]
    """Groups with a row that is consulted and not answered yet."""
    taps: Encoded
    """Normalised taps `[R,C,P,D]`."""
    unsent: Bool[Array, "R C"]
    """Positions whose taps the device has not got."""
    origin: Int[Array, " R"]
    """The row that each one descends from, at the last step whose reply has arrived."""


@functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "max_new_tokens"))
def prefill(
    config: CloudConfig,
    frozen: Params,
    router: RouterState,
    tokens: Int[Array, "G T"],
    lengths: Int[Array, " G"],
    seed: Int[Array, ""],
    *,
    slots: int,
    max_new_tokens: int,
) -> tuple[CloudState, Encoded | None, Float[Array, "G T D"] | None]:
    """Runs the prompts, and asks the router about their last tokens.

    Returns:
        The state, the normalised taps of all prompt tokens `[G,T,P,D]` where the side network reads or corrects them,
        and where it corrects them their states at the entry, which wait.
    """
    model, width = config.model, config.width
    groups, length = tokens.shape
    positions = prompt_positions(lengths, length)
    cache, places = init_cache(model.config, groups, slots, model.activation_dtype), place_by_position(positions, None)
    states, taps, cache = model.apply({"params": frozen}, tokens, positions, cache, places, method="lower")
    if not config.corrects_prompt:
        _, cache = model.apply({"params": frozen}, states, positions, cache, places, method="upper")
    last = jnp.arange(groups), lengths - 1
    prompt_taps = None
    if config.attends or config.corrects_prompt:
        prompt_taps = _encode_taps(config, frozen, taps)
        last_taps = jax.tree.map(lambda leaf: leaf[last], prompt_taps)
    else:
        last_taps = jax.tree.map(lambda leaf: leaf[:, 0], _encode_taps(config, frozen, taps[:, *last][:, :, None]))
    group_of_row = jnp.repeat(jnp.arange(groups), width)
    last_states, last_taps = take_rows((states[last], last_taps), group_of_row)
    rows, kept = groups * width, max_new_tokens if config.attends else 1
    no_taps = jax.tree.map(lambda leaf: jnp.zeros((rows, kept, *leaf.shape[1:]), leaf.dtype), last_taps)
    state = CloudState(
        cache=cache,
        slot_mask=prompt_slot_mask(lengths, width, slots),
        position=lengths,
        last_prompt_position=lengths - 1,
        hypotheses=init_hypotheses(groups, width, max_new_tokens, seed, search=config.beams is not None),
        router=router,
        states=jnp.zeros_like(last_states),
        consulted=jnp.zeros(rows, bool),
        waiting=jnp.zeros(groups, bool),
        taps=no_taps,
        unsent=jnp.zeros((rows, kept), bool),
        origin=group_of_row * width,
    )
    state = _route(config, frozen, state, jnp.ones(groups, bool), last_states, last_taps)
    if config.corrects_prompt:
        state = state._replace(waiting=jnp.ones(groups, bool))
    return state, prompt_taps, states if config.corrects_prompt else None


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def correct_prompts(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    states: Float[Array, "G T D"],
    g: Encoded,
    answered: Bool[Array, ""],
) -> CloudState:
    """Runs the prompts on from the entry, where all their tokens are corrected.

    Args:
        config: what the program is compiled for.
        frozen: the backbone's parameters.
        state: donated; all groups wait.
        states: uncorrected ones of the prompts at the entry.
        g: the device's answer `[G,T,D]`.
        answered: whether it is whole; otherwise no token of a prompt is corrected.

    Returns:
        The state, in which no group waits.
    """
    model = config.model
    corrected = with_correction(config.setting, states, unit(model, states) * wire.decode(g, states.dtype))
    states = jnp.where(answered, corrected, states)
    positions = prompt_positions(state.position, states.shape[1])
    places = place_by_position(positions, None)
    _, cache = model.apply({"params": frozen}, states, positions, state.cache, places, method="upper")
    last = jnp.arange(len(states)), state.last_prompt_position
    return state._replace(
        cache=cache,
        states=jnp.repeat(states[last], config.width, axis=0),
        consulted=answered & _is_hypothesis(state),
        waiting=jnp.zeros_like(state.waiting),
        unsent=state.unsent & ~answered,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    reply: Encoded | Int[Array, " R"],
    resumed: Bool[Array, " G"],
    answered: Bool[Array, " G"],
    sampling: Sampling,
) -> CloudState:
    """Goes on with the groups that need not wait any more, in a loop until every group waits or is done.

    Args:
        config: what the program is compiled for.
        frozen: the backbone's parameters.
        state: donated.
        reply: the device's answer, g `[R,D]` or in reply mode `token` its tokens; read at consulted rows of answered
            groups.
        resumed: waiting groups that go on.
        answered: those of them that `reply` is for; the others go on uncorrected.
        sampling: how to sample where there is no beam search.
    """
    row_answered, row_resumed = (jnp.repeat(groups, config.width) for groups in (answered, resumed))
    corrected = state.consulted & row_answered
    rows = jnp.arange(len(corrected), dtype=state.origin.dtype)
    state = state._replace(
        consulted=jnp.where(row_resumed, corrected, state.consulted),
        waiting=state.waiting & ~resumed,
        unsent=state.unsent & ~corrected[:, None],
        origin=jnp.where(row_answered, rows, state.origin),
    )
    if isinstance(reply, Encoded):
        g = unit(config.model, state.states) * wire.decode(reply, state.states.dtype)
        states = with_correction(config.setting, state.states, g)
        states = jnp.where(corrected[:, None], states, _uncorrected(config, state, state.states))
        state = state._replace(states=jnp.where(row_resumed[:, None], states, state.states))
    else:
        hypotheses = append_token(state.hypotheses, reply, corrected[:, None], answered, config.eos_ids)
        uncorrected = _uncorrected(config, state, state.states)
        states = jnp.where((row_resumed & ~row_answered)[:, None], uncorrected, state.states)
        state = state._replace(hypotheses=hypotheses, states=states)

    def is_active(s: CloudState) -> jax.Array:
        return ~s.waiting & ~s.hypotheses.is_done

    def step(s: CloudState) -> CloudState:
        s = _choose(config, frozen, s, is_active(s), sampling)
        active = is_active(s)
        tokens = last_tokens(s.hypotheses)
        positions = jnp.broadcast_to(jnp.where(active, s.position, PADDING)[:, None], tokens.shape)
        places, slot_mask = place_newest(s.slot_mask, s.position, s.hypotheses.num_generated, active)
        states, taps, cache = config.model.apply(
            {"params": frozen}, tokens, positions, s.cache, places, when=jnp.any(active), method="lower"
        )
        s = s._replace(cache=cache, slot_mask=slot_mask, position=s.position + active.astype(jnp.int32))
        states, taps = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (states, _encode_taps(config, frozen, taps))
        )
        return _route(config, frozen, s, active, states, taps)

    return jax.lax.while_loop(lambda s: jnp.any(is_active(s)), step, state)


def _encode_taps(config: CloudConfig, frozen: Params, taps: Float[Array, "P B T D"]) -> Encoded:
    """Normalises and encodes taps, `[B,T,P,D]`."""
    taps = normalize_taps(frozen, config.model.config, config.model.taps, taps)
    return wire.encode(config.codec, jnp.moveaxis(taps, 0, 2))


def _ask_router(
    config: CloudConfig, frozen: Params, router: RouterState, states: Float[Array, "G M D"]
) -> Bool[Array, "G M"]:
    """Computes sigma from states at the entry."""
    if config.setting not in ROUTED:
        return jnp.full(states.shape[:2], config.setting != "base")
    read = normalize_state(frozen, config.model, states).astype(jnp.float32)
    return consult(jnp.einsum("gmd,gdk->gmk", read, router.kernel), router.threshold[:, None])


def _uncorrected(config: CloudConfig, state: CloudState, states: Float[Array, "R D"]) -> Float[Array, "R D"]:
    """Computes the states that go on where the device is not asked or does not answer."""
    if config.setting not in ROUTED or config.corrects_prompt:
        return states
    offset = jnp.repeat(state.router.offset, config.width, axis=0).astype(states.dtype)
    return without_correction(states, unit(config.model, states) * offset)


def _is_hypothesis(state: CloudState) -> Bool[Array, " R"]:
    """Tells which rows hold a hypothesis: before its first choice a search has one."""
    return state.hypotheses.scores.reshape(-1) > IMPOSSIBLE / 2


def _route(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    active: Bool[Array, " G"],
    states: Float[Array, "R D"],
    taps: Encoded,
) -> CloudState:
    """Asks the router about the active groups, whose newest tokens have just reached the entry: groups that consult the
    device wait."""
    width, rows = config.width, jnp.arange(len(states))
    row_active = jnp.repeat(active, width)
    sigma = _ask_router(config, frozen, state.router, states.reshape(-1, width, states.shape[-1])).reshape(-1)
    sigma &= _is_hypothesis(state) & row_active
    consults = jnp.any(sigma.reshape(-1, width), axis=1)
    if config.attends:
        slot = jnp.repeat(state.position - 1 - state.last_prompt_position, width)
    else:
        slot = jnp.zeros(len(rows), jnp.int32)
    slot = jnp.where(row_active, slot, PADDING)
    goes_on = jnp.repeat(~consults, width)
    states = jnp.where(goes_on[:, None], _uncorrected(config, state, states), states)
    return state._replace(
        states=jnp.where(row_active[:, None], states, state.states),
        consulted=jnp.where(row_active, sigma, state.consulted),
        waiting=state.waiting | consults,
        taps=jax.tree.map(lambda kept, new: kept.at[rows, slot].set(new, mode="drop"), state.taps, taps),
        unsent=state.unsent.at[rows, slot].set(True, mode="drop"),
    )


def _choose(
    config: CloudConfig, frozen: Params, state: CloudState, active: Bool[Array, " G"], sampling: Sampling
) -> CloudState:
    """Goes on from the entry with the active groups, and adds one token to those that have not got theirs yet."""
    width = config.width
    states = state.states.reshape(-1, width, state.states.shape[-1])
    places = _newest_places(state, active)
    positions = jnp.broadcast_to(jnp.where(active, state.position - 1, PADDING)[:, None], states.shape[:2])
    hidden, cache = config.model.apply({"params": frozen}, states, positions, state.cache, places, method="upper")
    state = state._replace(cache=cache)
    choosing = active & (state.hypotheses.num_generated == state.position - 1 - state.last_prompt_position)
    any_chooses = jnp.any(choosing)

    def choose() -> tuple[Hypotheses, jax.Array]:
        return choose_next_token(
            config.model,
            frozen,
            hidden.reshape(-1, hidden.shape[-1]),
            state.consulted,
            state.hypotheses,
            choosing,
            sampling,
            config.beams,
            config.eos_ids,
        )

    def keep() -> tuple[Hypotheses, jax.Array]:
        shape = state.hypotheses.scores.shape
        return state.hypotheses, jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], shape)

    hypotheses, parents = jax.lax.cond(any_chooses, choose, keep)
    state = state._replace(hypotheses=hypotheses)
    if config.beams is None:
        return state
    by_row = (state.slot_mask, state.taps, state.unsent, state.origin)
    by_row = jax.lax.cond(any_chooses, lambda: take_rows(by_row, parent_rows(parents)), lambda: by_row)
    return state._replace(**dict(zip(("slot_mask", "taps", "unsent", "origin"), by_row)))


def _newest_places(state: CloudState, active: Bool[Array, " G"]) -> CachePlacement:
    """Places the newest tokens where they are already, for the blocks above the entry; the last token of a prompt,
    which all hypotheses of a group share, is placed once."""
    groups, width = state.hypotheses.scores.shape
    generated = state.hypotheses.num_generated[:, None]
    first = (state.position - 1)[:, None] + jnp.maximum(generated - 1, 0) * (width - 1)
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    slots = first + jnp.where(generated == 0, jnp.where(column == 0, 0, PADDING // 2), column)
    slots = jnp.where(active[:, None], slots, PADDING)
    return CachePlacement(slots, state.slot_mask.reshape(groups, 1, width, -1))
