"""The cloud's half: backbone, router, LM head and what was chosen so far. It never holds a side parameter.

A session is one generation of G prompts with K hypotheses each, R = G K independent rows. A jitted program runs tokens
and asks the router; while no token needs the device it goes on by itself. Where one does, its group *waits*: taps go
down, g comes back, and the token is finished from both, or from f alone when nothing comes.

Shape letters: G groups (prompts), K hypotheses, R = G K rows, T prompt tokens, N most new tokens, D width, P taps,
C positions whose taps are kept until they are sent (all new ones for a side network that attends, else the last).
"""

import dataclasses
import functools
import uuid
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spa_jax.data.encoding import Encoder
from spa_jax.data.pipeline import bucket
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.cache import init_cache, reorder
from spa_jax.decoding.fused import choose, pad_prompts
from spa_jax.decoding.hypotheses import IMPOSSIBLE, Generation, Hypotheses, begin, generations, newest, rows_of
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, SETTINGS, Setting, always, skipped
from spa_jax.models.llama import PADDING, Cache, Llama, Params, normalize_taps, positions_from_mask
from spa_jax.models.router import consult
from spa_jax.split import wire
from spa_jax.split.messages_pb2 import Correction, Open, Prompt, Taps
from spa_jax.split.wire import Codec, Encoded
from spa_jax.weights.backbone import Backbone

CHUNK_POSITIONS = 64
"""Prompt positions a message brings to a side network that attends."""


@dataclasses.dataclass(frozen=True)
class CloudConfig:
    """What a cloud program is compiled for."""

    model: Llama
    setting: Setting
    codec: Codec
    attends: bool
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
    out = model.apply({"params": frozen}, tokens, positions, cache)
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
    cache, hidden, taps = reorder((out.cache, hidden, taps), each)
    rows, kept = groups * width, room if config.attends else 1
    empty = jax.tree.map(lambda leaf: jnp.zeros((rows, kept, *leaf.shape[1:]), leaf.dtype), taps)
    state = CloudState(
        cache=cache,
        position=lengths,
        start=lengths - 1,
        hypotheses=begin(groups, width, room, seed, search=config.beams is not None),
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
    g: Encoded,
    over: Bool[Array, " G"],
    answered: Bool[Array, " G"],
    sampling: Sampling,
) -> CloudState:
    """Finishes tokens whose wait is over, then runs on in one loop until every group waits or is done.

    Args:
        config: what the program is compiled for.
        frozen: the backbone.
        state: donated.
        g: what the device says, `[R,D]`; read at consulted rows of answered groups.
        over: waiting groups that do not wait any more.
        answered: those that g is for; the others get their token from f alone.
        sampling: how to choose where there is no beam search.
    """
    width = config.width
    told = jnp.repeat(answered, width)
    use = state.consulted & told
    arange = jnp.arange(use.shape[0], dtype=state.origin.dtype)
    state = state._replace(
        waiting=state.waiting & ~over,
        unsent=state.unsent & ~use[:, None],
        origin=jnp.where(told, arange, state.origin),
    )
    state = _finish(config, frozen, state, over, use, wire.decode(g, state.hidden.dtype), sampling)

    def runs(s: CloudState) -> jax.Array:
        return ~s.waiting & ~s.hypotheses.done

    def step(s: CloudState) -> CloudState:
        run = runs(s)
        positions = jnp.repeat(jnp.where(run, s.position, PADDING), width)[:, None]
        tokens = newest(s.hypotheses)[:, None]
        out = config.model.apply({"params": frozen}, tokens, positions, s.cache)
        assert out.cache is not None
        s = s._replace(cache=out.cache, position=s.position + run)
        taps = jax.tree.map(lambda leaf: leaf[:, 0], _encode_taps(config, frozen, out.taps))
        return _judge(config, frozen, s, run, out.hidden[:, 0], taps, sampling)

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
    alone = skipped(f, jnp.repeat(state.router.offset, width, axis=0)) if config.setting in ROUTED else f
    entering = jnp.where(use[:, None], always(config.setting, f, g), alone)

    def chosen() -> tuple[Hypotheses, jax.Array]:
        return choose(
            config.model, frozen, entering, use, state.hypotheses, groups, sampling, config.beams, config.eos_ids
        )

    def unchanged() -> tuple[Hypotheses, jax.Array]:
        shape = state.hypotheses.scores.shape
        return state.hypotheses, jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], shape)

    hypotheses, parents = jax.lax.cond(some, chosen, unchanged)
    state = state._replace(hypotheses=hypotheses)
    if config.beams is None:
        return state
    follow = (state.cache, state.taps, state.unsent, state.origin)
    follow = jax.lax.cond(some, lambda: reorder(follow, rows_of(parents)), lambda: follow)
    return state._replace(**dict(zip(("cache", "taps", "unsent", "origin"), follow)))


@functools.partial(jax.jit, static_argnums=(0,))
def _select(size: int, taps: Encoded, rows: Int[Array, " M"], slots: Int[Array, " M"]) -> Encoded:
    return jax.tree.map(lambda leaf: leaf[rows, slots], taps)


class Session:
    """One generation in the cloud: `wanted` says what the device is asked, `resume` takes its answer."""

    def __init__(
        self, config: CloudConfig, frozen: Params, limit: int, request: Open, prompts: list[list[int]]
    ) -> None:
        self.id = uuid.uuid4().hex
        self.config = config
        self.degraded = 0
        """How often a prompt's next token was chosen without an answer that was wanted."""
        self._frozen = frozen
        room = request.max_new_tokens
        tokens, self._lengths = pad_prompts(prompts, room, limit)
        groups, d = len(prompts), config.model.config.hidden_size
        s = request.sampling
        self._sampling = Sampling(s.temperature, s.top_k, s.top_p).check()
        kernel = _floats(request.router, (d, 2), "router") if config.setting in ROUTED else np.zeros((d, 2))
        offset = _floats(request.offset, (d,), "offset") if request.offset else np.zeros(d)
        router = RouterState(
            jnp.broadcast_to(jnp.asarray(kernel, jnp.float32), (groups, d, 2)),
            jnp.full(groups, request.threshold, jnp.float32),
            jnp.broadcast_to(jnp.asarray(offset, jnp.float32), (groups, d)),
        )
        slots = bucket(int(self._lengths.max()) + room, 64)
        self._state, self._prompt = prefill(
            config, frozen, router, tokens, self._lengths, s.seed, self._sampling, slots=slots, room=room
        )
        self._step = self._base = 0
        rows = groups * config.width
        self._nothing = wire.encode(config.codec, jnp.zeros((rows, d)))
        self._asked: np.ndarray = np.array([], np.int64)
        self._waiting = np.zeros(groups, bool)
        self._go_on(self._nothing, self._waiting)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self._lengths.max())

    def prompt_messages(self) -> list[Taps]:
        """The taps of all prompt positions but the last, in chunks; none for a side network without attention."""
        if self._prompt is None:
            return []
        prompt, self._prompt = wire.to_host(self._prompt), None
        messages = []
        for group, length in enumerate(self._lengths):
            for begin_at in range(0, int(length) - 1, CHUNK_POSITIONS):
                chunk = slice(begin_at, min(begin_at + CHUNK_POSITIONS, int(length) - 1))
                positions = range(chunk.start, chunk.stop)
                part = jax.tree.map(lambda leaf, at=(group, chunk): leaf[at], prompt)
                row = group * self.config.width
                messages.append(
                    Taps(rows=[row] * len(positions), positions=positions, taps=wire.pack(part), prompt=True)
                )
        return messages

    def wanted(self) -> Taps | None:
        """What the device is asked now; None when the generation is over."""
        s = self._state
        waiting, consulted, unsent, origin, start, position = jax.device_get(
            (s.waiting, s.consulted, s.unsent, s.origin, s.start, s.position)
        )
        if not waiting.any():
            return None
        width = self.config.width
        self._asked = np.flatnonzero(consulted & np.repeat(waiting, width))
        self._waiting = waiting
        chosen = np.zeros_like(unsent)
        chosen[self._asked] = unsent[self._asked]
        rows, slots = np.nonzero(chosen)
        first = np.repeat(start, width) if self.config.attends else np.repeat(position - 1, width)
        size = bucket(len(rows), len(origin))
        padded = np.zeros((2, size), np.int32)
        padded[:, : len(rows)] = rows, slots
        taps = jax.tree.map(lambda leaf: leaf[: len(rows)], wire.to_host(_select(size, s.taps, *padded)))
        self._step += 1
        moved = self.config.attends and not np.array_equal(origin, np.arange(len(origin)))
        return Taps(
            step=self._step,
            base=self._base,
            rows=rows.tolist(),
            positions=(first[rows] + slots).tolist(),
            origins=origin.tolist() if moved else [],
            taps=wire.pack(taps),
        )

    def resume(self, reply: Correction | None) -> None:
        """Goes on with the device's answer, or without one; then `wanted` says what is next.

        Raises:
            WireError: the answer is not one to the last question; the session still waits for one.
        """
        g, answered = self._nothing, np.zeros_like(self._waiting)
        if reply is None:
            self.degraded += int(self._waiting.sum())
        else:
            if reply.step != self._step:
                raise wire.WireError(f"a correction of step {reply.step} came where one of step {self._step} is due")
            d = self.config.model.config.hidden_size
            told = wire.unpack(self.config.codec, reply.g, (len(self._asked), d))
            rows = len(self._waiting) * self.config.width
            g, answered = jax.tree.map(lambda part: _scatter(part, self._asked, rows), told), self._waiting
            self._base = self._step
        self._go_on(g, answered)

    def _go_on(self, g: Encoded, answered: np.ndarray) -> None:
        self._state = advance(self.config, self._frozen, self._state, g, self._waiting, answered, self._sampling)

    def result(self) -> list[Generation]:
        """What was generated so far."""
        return generations(self._state.hypotheses, self.config.eos_ids)

    def forget(self) -> None:
        """Gives the state's memory back; the session is over."""
        del self._state


def _scatter(part: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    whole = np.zeros((count, *part.shape[1:]), part.dtype)
    whole[rows] = part
    return whole


class Cloud:
    """A backbone that opens sessions."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._dtype = jax.tree.leaves(backbone.params)[0].dtype

    def open(self, request: Open) -> Session:
        """Begins a generation: runs the prompts, and on until the device is needed.

        Raises:
            UserError: another protocol version, backbone, or a request that makes no sense, each by name.
        """
        if request.version != wire.VERSION:
            raise UserError(
                f"the device speaks version {request.version} of the protocol and the cloud version {wire.VERSION}: "
                "install the same spa_jax on both"
            )
        backbone = self._backbone
        if request.backbone != backbone.fingerprint:
            raise UserError(
                f"the plugin was trained on a backbone with fingerprint {request.backbone}, and the cloud runs "
                f"'{backbone.name}' with fingerprint {backbone.fingerprint}"
            )
        if request.setting not in SETTINGS or not request.prompts or not 0 <= request.threshold <= 1:
            raise UserError("the device asks for an unknown setting, a threshold out of range, or without a prompt")
        taps = tuple(request.taps)
        if not taps or list(taps) != sorted(set(taps)) or taps[-1] > backbone.config.num_layers:
            raise UserError(f"the device asks for taps {taps}, which this backbone has not")
        prompts = [self._tokens_of(prompt, request.template) for prompt in request.prompts]
        if any(token >= backbone.config.vocab_size for prompt in prompts for token in prompt):
            raise UserError("the prompt holds tokens that this backbone has not")
        beams = None
        if request.HasField("beams"):
            early: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
            if request.beams.early_stopping not in early:
                raise UserError(f"early_stopping is '{request.beams.early_stopping}'; choices are {', '.join(early)}")
            stopping = early[request.beams.early_stopping]
            beams = Beams(request.beams.width, request.beams.length_penalty, stopping).check()  # type: ignore[arg-type]
        model = Llama(backbone.config, taps, self._dtype)
        config = CloudConfig(
            model, request.setting, wire.check_codec(request.codec), request.attends, beams, backbone.eos_ids
        )
        return Session(config, backbone.params, backbone.config.max_position_embeddings, request, prompts)

    def text(self, generation: Generation) -> str:
        """What was generated, as text."""
        return self._backbone.tokenizer.decode(generation.tokens, skip_special_tokens=True)

    def _tokens_of(self, prompt: Prompt, template: str) -> list[int]:
        if not prompt.text:
            return list(prompt.tokens)
        backbone = self._backbone
        return Encoder(backbone.tokenizer, template, backbone.config.max_position_embeddings).prompt(prompt.text)


def _floats(data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    if len(data) != 4 * int(np.prod(shape)):
        raise wire.WireError(f"the {name} has {len(data)} bytes, but one for this backbone has {4 * np.prod(shape)}")
    array = np.frombuffer(data, "<f4").reshape(shape)
    if not np.isfinite(array).all():
        raise wire.WireError(f"the {name} has numbers that are not finite")
    return array
