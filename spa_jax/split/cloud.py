"""The cloud's two jitted programs: backbone, router, LM head and the hypotheses. They never hold a side parameter.

A session is one generation of G prompts with K hypotheses each, R = G K independent rows. A program runs tokens and
asks the router; while no token needs the device it goes on by itself. Where one does, its group *waits*: taps go down,
g comes back, and the token is chosen from f and g, or from f alone when nothing comes.

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
from spa_jax.models.block import PADDING, Cache, place_by_position, positions_from_mask
from spa_jax.models.combine import ROUTED, Setting, with_correction, without_correction
from spa_jax.models.llama import Llama, Params, normalize_taps
from spa_jax.models.router import consult
from spa_jax.split import wire
from spa_jax.split.wire import Codec, Encoded, ReplyMode


@dataclasses.dataclass(frozen=True)
class CloudConfig:
    """The static argument of the programs.

    Attributes:
        model: the backbone's program, with the taps that the side network reads.
        setting: what enters the LM head.
        codec: how numbers travel.
        attends: whether the side network attends, and so reads the taps of all tokens.
        reply: what the device answers with.
        beams: how to search; None to sample.
        eos_ids: tokens that end a generation.
    """

    model: Llama
    setting: Setting
    codec: Codec
    attends: bool
    reply: ReplyMode
    beams: Beams | None
    eos_ids: tuple[int, ...]

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
    hidden: Float[Array, "R D"]
    """f, from which the next token is chosen."""
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
    sampling: Sampling,
    *,
    slots: int,
    max_new_tokens: int,
) -> tuple[CloudState, Encoded | None]:
    """Runs the prompts, and chooses the first tokens of groups for which the device is not asked.

    Returns:
        The state, and the taps of all prompt positions `[G,T,P,D]` for a side network that attends.
    """
    model, width = config.model, config.width
    groups, length = tokens.shape
    positions = positions_from_mask(jnp.arange(length, dtype=jnp.int32)[None, :] < lengths[:, None])
    cache = init_cache(model.config, groups, slots, model.dtype)
    out = model.apply({"params": frozen}, tokens, positions, cache, place_by_position(positions, None))
    last = (lengths - 1)[:, None, None]
    hidden = jnp.take_along_axis(out.hidden, last, axis=1)[:, 0]
    prompt = None
    if config.attends:
        prompt = _encode_taps(config, frozen, out.taps)
        taps = jax.tree.map(lambda leaf: leaf[jnp.arange(groups), lengths - 1], prompt)
    else:
        taps = _encode_taps(config, frozen, jnp.take_along_axis(out.taps, last[None], axis=2))
        taps = jax.tree.map(lambda leaf: leaf[:, 0], taps)
    group_of_row = jnp.repeat(jnp.arange(groups), width)
    hidden, taps = take_rows((hidden, taps), group_of_row)
    rows, kept = groups * width, max_new_tokens if config.attends else 1
    no_taps = jax.tree.map(lambda leaf: jnp.zeros((rows, kept, *leaf.shape[1:]), leaf.dtype), taps)
    assert out.cache is not None
    state = CloudState(
        cache=out.cache,
        slot_mask=prompt_slot_mask(lengths, width, slots),
        position=lengths,
        last_prompt_position=lengths - 1,
        hypotheses=init_hypotheses(groups, width, max_new_tokens, seed, search=config.beams is not None),
        router=router,
        hidden=jnp.zeros_like(hidden),
        consulted=jnp.zeros(rows, bool),
        waiting=jnp.zeros(groups, bool),
        taps=no_taps,
        unsent=jnp.zeros((rows, kept), bool),
        origin=group_of_row * width,
    )
    return _route(config, frozen, state, jnp.ones(groups, bool), hidden, taps, sampling), prompt


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
    """Chooses the tokens of groups that need not wait any more, then loops until every group waits or is done.

    Args:
        config: what the program is compiled for.
        frozen: the backbone's parameters.
        state: donated.
        reply: the device's answer, g `[R,D]` or in reply mode `token` its tokens; read at consulted rows of answered
            groups.
        resumed: waiting groups that go on.
        answered: those of them that `reply` is for; the others get their token from f alone.
        sampling: how to sample where there is no beam search.
    """
    row_answered = jnp.repeat(answered, config.width)
    corrected = state.consulted & row_answered
    rows = jnp.arange(len(corrected), dtype=state.origin.dtype)
    state = state._replace(
        waiting=state.waiting & ~resumed,
        unsent=state.unsent & ~corrected[:, None],
        origin=jnp.where(row_answered, rows, state.origin),
    )
    if isinstance(reply, Encoded):
        g = wire.decode(reply, state.hidden.dtype)
    else:
        hypotheses = append_token(state.hypotheses, reply, corrected[:, None], answered, config.eos_ids)
        state = state._replace(hypotheses=hypotheses)
        resumed, corrected = resumed & ~answered, jnp.zeros_like(corrected)
        g = jnp.zeros_like(state.hidden)
    state = _choose(config, frozen, state, resumed, corrected, g, sampling)

    def is_active(s: CloudState) -> jax.Array:
        return ~s.waiting & ~s.hypotheses.is_done

    def step(s: CloudState) -> CloudState:
        active = is_active(s)
        tokens = last_tokens(s.hypotheses)
        positions = jnp.broadcast_to(jnp.where(active, s.position, PADDING)[:, None], tokens.shape)
        places, slot_mask = place_newest(s.slot_mask, s.position, s.hypotheses.num_generated, active)
        out = config.model.apply({"params": frozen}, tokens, positions, s.cache, places)
        assert out.cache is not None
        s = s._replace(cache=out.cache, slot_mask=slot_mask, position=s.position + active.astype(jnp.int32))
        hidden, taps = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (out.hidden, _encode_taps(config, frozen, out.taps))
        )
        return _route(config, frozen, s, active, hidden, taps, sampling)

    return jax.lax.while_loop(lambda s: jnp.any(is_active(s)), step, state)


def _encode_taps(config: CloudConfig, frozen: Params, taps: Float[Array, "P B T D"]) -> Encoded:
    """Normalises and encodes taps, `[B,T,P,D]`."""
    taps = normalize_taps(frozen, config.model.config, config.model.taps, taps)
    return wire.encode(config.codec, jnp.moveaxis(taps, 0, 2))


def _route(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    active: Bool[Array, " G"],
    hidden: Float[Array, "R D"],
    taps: Encoded,
    sampling: Sampling,
) -> CloudState:
    """Asks the router about the active groups, which have just run: those that consult the device wait with their
    `hidden` and `taps`, and the others choose their next token."""
    width, rows = config.width, jnp.arange(len(hidden))
    row_active = jnp.repeat(active, width)
    exists = state.hypotheses.scores.reshape(-1) > IMPOSSIBLE / 2  # before its first choice a search has one hypothesis
    if config.setting in ROUTED:
        logits = jnp.einsum("rd,rdk->rk", hidden.astype(jnp.float32), jnp.repeat(state.router.kernel, width, axis=0))
        sigma = consult(logits, jnp.repeat(state.router.threshold, width))
    else:
        sigma = jnp.full(len(rows), config.setting != "base")
    sigma &= exists & row_active
    consults = jnp.any(sigma.reshape(-1, width), axis=1)
    if config.attends:
        slot = jnp.repeat(state.position - 1 - state.last_prompt_position, width)
    else:
        slot = jnp.zeros(len(rows), jnp.int32)
    slot = jnp.where(row_active, slot, PADDING)
    state = state._replace(
        hidden=jnp.where(row_active[:, None], hidden, state.hidden),
        consulted=jnp.where(row_active, sigma, state.consulted),
        waiting=state.waiting | consults,
        taps=jax.tree.map(lambda kept, new: kept.at[rows, slot].set(new, mode="drop"), state.taps, taps),
        unsent=state.unsent.at[rows, slot].set(True, mode="drop"),
    )
    no_g = jnp.zeros_like(hidden)
    return _choose(config, frozen, state, active & ~consults, jnp.zeros_like(sigma), no_g, sampling)


def _choose(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    active: Bool[Array, " G"],
    corrected: Bool[Array, " R"],
    g: Float[Array, "R D"],
    sampling: Sampling,
) -> CloudState:
    """Adds one token to the active groups: from f and g at `corrected` rows, from f alone at the others."""
    width, f, any_active = config.width, state.hidden, jnp.any(active)
    head_input = f
    if config.setting in ROUTED:
        head_input = without_correction(f, jnp.repeat(state.router.offset, width, axis=0))
    head_input = jnp.where(corrected[:, None], with_correction(config.setting, f, g), head_input)

    def choose() -> tuple[Hypotheses, jax.Array]:
        return choose_next_token(
            config.model,
            frozen,
            head_input,
            corrected,
            state.hypotheses,
            active,
            sampling,
            config.beams,
            config.eos_ids,
        )

    def keep() -> tuple[Hypotheses, jax.Array]:
        shape = state.hypotheses.scores.shape
        return state.hypotheses, jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], shape)

    hypotheses, parents = jax.lax.cond(any_active, choose, keep)
    state = state._replace(hypotheses=hypotheses)
    if config.beams is None:
        return state
    by_row = (state.slot_mask, state.taps, state.unsent, state.origin)
    by_row = jax.lax.cond(any_active, lambda: take_rows(by_row, parent_rows(parents)), lambda: by_row)
    return state._replace(**dict(zip(("slot_mask", "taps", "unsent", "origin"), by_row)))
