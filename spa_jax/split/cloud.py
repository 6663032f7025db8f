"""The cloud's half: backbone, router, LM head and what was chosen so far. It never holds a side parameter.

A session is one generation of G prompts with K hypotheses each, R = G K independent rows. A jitted program runs tokens
and asks the router; while no token needs the device it goes on by itself. Where one does, its group *waits*: taps go
down, g comes back, and the token is finished from both, or from f alone when nothing comes.

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
from spa_jax.decoding.cache import init_cache, place_newest, reorder, see_prompt
from spa_jax.decoding.fused import choose_next_token
from spa_jax.decoding.hypotheses import IMPOSSIBLE, Hypotheses, init_hypotheses, last_tokens, parent_rows
from spa_jax.decoding.sampling import Sampling, append
from spa_jax.models.block import PADDING, Cache, place_by_position, positions_from_mask
from spa_jax.models.combine import ROUTED, Setting, with_correction, without_correction
from spa_jax.models.llama import Llama, Params, normalize_taps
from spa_jax.models.router import consult
from spa_jax.split import wire
from spa_jax.split.wire import Codec, Encoded, ReplyMode


@dataclasses.dataclass(frozen=True)
class CloudConfig:
    """What a cloud program is compiled for."""

    model: Llama
    setting: Setting
    codec: Codec
    attends: bool
    reply: ReplyMode
    beams: Beams | None
    eos_ids: tuple[int, ...]

    @property
    def width(self) -> int:
        """K."""
        return self.beams.width if self.beams else 1


class RouterState(NamedTuple):
    """The routers that devices brought; every group has its own."""

    kernel: Float[Array, "G D 2"]
    threshold: Float[Array, " G"]
    offset: Float[Array, "G D"]
    """Zero where a router has none."""


class CloudState(NamedTuple):
    """Sessions under way; every leaf has the batch first."""

    cache: Cache
    seen: Bool[Array, "R S"]
    """The cache slots of the tokens that each hypothesis consists of."""
    position: Int[Array, " G"]
    """Where the newest token will be run."""
    start: Int[Array, " G"]
    """Position of the last prompt token, the first whose taps may be asked for."""
    hypotheses: Hypotheses
    router: RouterState
    hidden: Float[Array, "R D"]
    """f of the token that is being chosen."""
    consulted: Bool[Array, " R"]
    """Whether the device is asked for it."""
    waiting: Bool[Array, " G"]
    """Groups with a row that is consulted and not answered yet."""
    taps: Encoded
    """`[R,C,P,D]`."""
    unsent: Bool[Array, "R C"]
    """Positions whose taps the device has not seen."""
    origin: Int[Array, " R"]
    """The row each one descends from, among those that the device knows."""


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("slots", "room"))
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
    room: int,
) -> tuple[CloudState, Encoded | None]:
    """Runs the prompts, and chooses the first tokens that need nobody.

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
    each = jnp.repeat(jnp.arange(groups), width)
    hidden, taps = reorder((hidden, taps), each)
    rows, kept = groups * width, room if config.attends else 1
    empty = jax.tree.map(lambda leaf: jnp.zeros((rows, kept, *leaf.shape[1:]), leaf.dtype), taps)
    assert out.cache is not None
    state = CloudState(
        cache=out.cache,
        seen=see_prompt(lengths, width, slots),
        position=lengths,
        start=lengths - 1,
        hypotheses=init_hypotheses(groups, width, room, seed, search=config.beams is not None),
        router=router,
        hidden=jnp.zeros_like(hidden),
        consulted=jnp.zeros(rows, bool),
        waiting=jnp.zeros(groups, bool),
        taps=empty,
        unsent=jnp.zeros((rows, kept), bool),
        origin=each * width,
    )
    return _judge(config, frozen, state, jnp.ones(groups, bool), hidden, taps, sampling), prompt


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def advance(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    told: Encoded | Int[Array, " R"],
    over: Bool[Array, " G"],
    answered: Bool[Array, " G"],
    sampling: Sampling,
) -> CloudState:
    """Finishes tokens whose wait is over, then runs on in one loop until every group waits or is done.

    Args:
        config: what the program is compiled for.
        frozen: the backbone.
        state: donated.
        told: what the device says, g `[R,D]` or in reply mode `token` its tokens; read at consulted rows of answered
            groups.
        over: waiting groups that do not wait any more.
        answered: those that g is for; the others get their token from f alone.
        sampling: how to choose where there is no beam search.
    """
    width = config.width
    known = jnp.repeat(answered, width)
    use = state.consulted & known
    arange = jnp.arange(use.shape[0], dtype=state.origin.dtype)
    state = state._replace(
        waiting=state.waiting & ~over,
        unsent=state.unsent & ~use[:, None],
        origin=jnp.where(known, arange, state.origin),
    )
    if isinstance(told, Encoded):
        g = wire.decode(told, state.hidden.dtype)
    else:
        given = append(state.hypotheses, told, use[:, None], answered, config.eos_ids)
        state, over, use = state._replace(hypotheses=given), over & ~answered, jnp.zeros_like(use)
        g = jnp.zeros_like(state.hidden)
    state = _finish(config, frozen, state, over, use, g, sampling)

    def runs(s: CloudState) -> jax.Array:
        return ~s.waiting & ~s.hypotheses.done

    def step(s: CloudState) -> CloudState:
        run = runs(s)
        tokens = last_tokens(s.hypotheses)
        positions = jnp.broadcast_to(jnp.where(run, s.position, PADDING)[:, None], tokens.shape)
        places, seen = place_newest(s.seen, s.position, s.hypotheses.made, run)
        out = config.model.apply({"params": frozen}, tokens, positions, s.cache, places)
        assert out.cache is not None
        s = s._replace(cache=out.cache, seen=seen, position=s.position + run)
        hidden, taps = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (out.hidden, _encode_taps(config, frozen, out.taps))
        )
        return _judge(config, frozen, s, run, hidden, taps, sampling)

    return jax.lax.while_loop(lambda s: jnp.any(runs(s)), step, state)


def _encode_taps(config: CloudConfig, frozen: Params, taps: Float[Array, "P B T D"]) -> Encoded:
    """Normalised and encoded, `[B,T,P,D]`."""
    taps = normalize_taps(frozen, config.model.config, config.model.taps, taps)
    return wire.encode(config.codec, jnp.moveaxis(taps, 0, 2))


def _judge(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    run: Bool[Array, " G"],
    hidden: Float[Array, "R D"],
    taps: Encoded,
    sampling: Sampling,
) -> CloudState:
    """Keeps what was just computed for the groups that ran, and finishes the tokens that need nobody."""
    width, rows = config.width, hidden.shape[0]
    row_runs = jnp.repeat(run, width)
    live = state.hypotheses.scores.reshape(-1) > IMPOSSIBLE / 2  # before its first choice a search has one hypothesis
    if config.setting in ROUTED:
        logits = jnp.einsum("rd,rdk->rk", hidden.astype(jnp.float32), jnp.repeat(state.router.kernel, width, axis=0))
        sigma = consult(logits, jnp.repeat(state.router.threshold, width))
    else:
        sigma = jnp.full(rows, config.setting != "base")
    sigma &= live & row_runs
    asks = jnp.any(sigma.reshape(-1, width), axis=1)
    slot = jnp.repeat(state.position - 1 - state.start, width) if config.attends else jnp.zeros(rows, jnp.int32)
    slot = jnp.where(row_runs, slot, PADDING)
    each = jnp.arange(rows)
    state = state._replace(
        hidden=jnp.where(row_runs[:, None], hidden, state.hidden),
        consulted=jnp.where(row_runs, sigma, state.consulted),
        waiting=state.waiting | asks,
        taps=jax.tree.map(lambda kept, new: kept.at[each, slot].set(new, mode="drop"), state.taps, taps),
        unsent=state.unsent.at[each, slot].set(True, mode="drop"),
    )
    return _finish(config, frozen, state, run & ~asks, jnp.zeros_like(sigma), jnp.zeros_like(hidden), sampling)


def _finish(
    config: CloudConfig,
    frozen: Params,
    state: CloudState,
    groups: Bool[Array, " G"],
    use: Bool[Array, " R"],
    g: Float[Array, "R D"],
    sampling: Sampling,
) -> CloudState:
    """Chooses the next token of these groups: with g at the rows in `use`, from f alone at the others."""
    width = config.width

    f, some = state.hidden, jnp.any(groups)
    alone = without_correction(f, jnp.repeat(state.router.offset, width, axis=0)) if config.setting in ROUTED else f
    entering = jnp.where(use[:, None], with_correction(config.setting, f, g), alone)

    def chosen() -> tuple[Hypotheses, jax.Array]:
        return choose_next_token(
            config.model, frozen, entering, use, state.hypotheses, groups, sampling, config.beams, config.eos_ids
        )

    def unchanged() -> tuple[Hypotheses, jax.Array]:
        shape = state.hypotheses.scores.shape
        return state.hypotheses, jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], shape)

    hypotheses, parents = jax.lax.cond(some, chosen, unchanged)
    state = state._replace(hypotheses=hypotheses)
    if config.beams is None:
        return state
    follow = (state.seen, state.taps, state.unsent, state.origin)
    follow = jax.lax.cond(some, lambda: reorder(follow, parent_rows(parents)), lambda: follow)
    return state._replace(**dict(zip(("seen", "taps", "unsent", "origin"), follow)))
