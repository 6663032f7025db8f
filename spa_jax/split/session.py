"""The cloud's side of a generation: what it asks of the device, and what it makes of the answers."""

import dataclasses
import uuid

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from spa_jax.data.encoding import Encoder, token_texts
from spa_jax.data.pipeline import padded_length
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.cache import cache_bytes, count_slots
from spa_jax.decoding.fused import check_lengths, pad_prompts
from spa_jax.decoding.hypotheses import Generation, to_generations
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, SETTINGS
from spa_jax.models.llama import Params
from spa_jax.split import wire
from spa_jax.split.cloud import CloudConfig, RouterState, advance, prefill
from spa_jax.split.messages_pb2 import Open, Reply, Taps
from spa_jax.split.wire import Encoded
from spa_jax.weights.backbone import Backbone

CHUNK_POSITIONS = 64
"""Prompt positions a message brings to a side network that attends."""
MOST_PROMPTS, LONGEST_REQUEST = 2**10, 2**18
"""Of a generation: prompts, and their characters or tokens together; reading more would keep other sessions waiting."""
MOST_PROGRAMS = 32
"""Kinds of generations whose compiled programs are kept; some ten MiB each."""


@jax.jit
def _select(taps: Encoded, rows: Int[Array, " M"], slots: Int[Array, " M"]) -> Encoded:
    return jax.tree.map(lambda leaf: leaf[rows, slots], taps)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A generation that may begin.

    Attributes:
        config: what the cloud's programs are compiled for.
        prompts: token ids.
        lengths: of the prompts.
        room: most new tokens N.
        sampling: how to choose.
        seed: of sampling.
        kernel: of the router `[D,2]`.
        offset: of the router `[D]`.
        threshold: of the router.
    """

    config: CloudConfig
    prompts: list[list[int]]
    lengths: Int[np.ndarray, " G"]
    room: int
    sampling: Sampling
    seed: int
    kernel: np.ndarray
    offset: np.ndarray
    threshold: float

    @property
    def slots(self) -> int:
        """Cache slots of each prompt."""
        return count_slots(int(self.lengths.max()), self.room, self.config.width)

    @property
    def bytes(self) -> int:
        """Memory that it takes, nearly: cache, taps that are kept, and of each row logits and vectors of its width."""
        model, groups, width = self.config.model, len(self.prompts), self.config.width
        size = model.config
        taps = wire.bytes_per_position(self.config.codec, len(model.taps), size.hidden_size)
        vectors = 4 * (size.vocab_size + 8 * size.hidden_size)
        kept = taps * (int(self.lengths.max()) + self.room if self.config.attends else 1)
        return cache_bytes(size, groups, self.slots, model.dtype) + groups * width * (kept + vectors)


class Session:
    """One generation in the cloud: `wanted` says what the device is asked, `resume` takes its answer."""

    def __init__(self, plan: Plan, frozen: Params) -> None:
        self.id = uuid.uuid4().hex
        self.config = config = plan.config
        self.degraded = 0
        """How often a prompt's next token was chosen without an answer that was wanted."""
        self._frozen = frozen
        groups, d = len(plan.prompts), config.model.config.hidden_size
        self._lengths, self._sampling = plan.lengths, plan.sampling
        router = RouterState(
            jnp.broadcast_to(jnp.asarray(plan.kernel, jnp.float32), (groups, d, 2)),
            jnp.full(groups, plan.threshold, jnp.float32),
            jnp.broadcast_to(jnp.asarray(plan.offset, jnp.float32), (groups, d)),
        )
        self._state, self._prompt = prefill(
            config,
            frozen,
            router,
            pad_prompts(plan.prompts),
            plan.lengths,
            plan.seed,
            plan.sampling,
            slots=plan.slots,
            room=plan.room,
        )
        self._step = self._base = 0
        rows = groups * config.width
        self._takes_tokens = config.reply == "token"
        no_g = wire.to_host(wire.encode(config.codec, jnp.zeros((rows, d))))
        self._nothing: Encoded | np.ndarray = np.zeros(rows, np.int32) if self._takes_tokens else no_g
        self._asked: np.ndarray = np.array([], np.int64)
        self._waiting = np.zeros(groups, bool)
        self._go_on(self._nothing, self._waiting)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return self._lengths.tolist()

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
        waiting, consulted, unsent, origin, start, position, f = jax.device_get(
            (s.waiting, s.consulted, s.unsent, s.origin, s.start, s.position, s.hidden if self._takes_tokens else None)
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
        padded = np.zeros((2, padded_length(len(rows), len(origin))), np.int32)
        padded[:, : len(rows)] = rows, slots
        taps = jax.tree.map(lambda leaf: leaf[: len(rows)], wire.to_host(_select(s.taps, *padded)))
        self._step += 1
        moved = self.config.attends and not np.array_equal(origin, np.arange(len(origin)))
        return Taps(
            step=self._step,
            base=self._base,
            rows=rows.tolist(),
            positions=(first[rows] + slots).tolist(),
            origins=origin.tolist() if moved else [],
            taps=wire.pack(taps),
            f=wire.pack(Encoded(f[self._asked].astype(np.float32), None)) if self._takes_tokens else None,
        )

    def resume(self, reply: Reply | None) -> None:
        """Goes on with the device's answer, or without one; then `wanted` says what is next.

        Raises:
            WireError: the answer is not one to the last question; the session still waits for one.
        """
        told, answered = self._nothing, np.zeros_like(self._waiting)
        if reply is None:
            self.degraded += int(self._waiting.sum())
        else:
            if reply.step != self._step:
                raise wire.WireError(f"a correction of step {reply.step} came where one of step {self._step} is due")
            rows = len(self._waiting) * self.config.width
            said = self._tokens_of(reply) if self._takes_tokens else self._g_of(reply)
            told, answered = jax.tree.map(lambda part: _scatter(part, self._asked, rows), said), self._waiting
            self._base = self._step
        self._go_on(told, answered)

    def _g_of(self, reply: Reply) -> Encoded:
        return wire.unpack(self.config.codec, reply.g, (len(self._asked), self.config.model.config.hidden_size))

    def _tokens_of(self, reply: Reply) -> np.ndarray:
        tokens, vocabulary = np.array(reply.tokens, np.int64), self.config.model.config.vocab_size
        if len(tokens) != len(self._asked) or (tokens >= vocabulary).any():
            raise wire.WireError(f"{len(tokens)} tokens came where {len(self._asked)} below {vocabulary} are due")
        return tokens.astype(np.int32)

    def _go_on(self, told: Encoded | np.ndarray, answered: np.ndarray) -> None:
        self._state = advance(self.config, self._frozen, self._state, told, self._waiting, answered, self._sampling)

    def result(self) -> list[Generation]:
        """What was generated so far."""
        return to_generations(self._state.hypotheses, self.config.eos_ids)

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
        self._compiled: set[tuple[object, ...]] = set()

    def open(self, request: Open) -> Session:
        """Begins a generation: runs the prompts, and on until the device is needed.

        Raises:
            UserError: as of `plan`.
        """
        return self.begin(self.plan(request))

    def begin(self, plan: Plan) -> Session:
        """`open` of what was planned; when there are too many programs, all are compiled anew as they are needed."""
        kind = (plan.config, plan.slots, plan.room, pad_prompts(plan.prompts).shape)
        if kind not in self._compiled and len(self._compiled) >= MOST_PROGRAMS:
            for program in (prefill, advance, _select):
                program.clear_cache()  # type: ignore[attr-defined]
            self._compiled.clear()
        self._compiled.add(kind)
        return Session(plan, self._backbone.params)

    def plan(self, request: Open) -> Plan:
        """What a generation will take, before anything is computed.

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
        most = backbone.config.num_layers + 1
        if not 0 < len(taps) <= most or list(taps) != sorted(set(taps)) or taps[-1] >= most:
            raise UserError(f"the device asks for taps {taps[:most]}, which this backbone has not")
        size = sum(len(prompt.text) + len(prompt.tokens) for prompt in request.prompts)
        if len(request.prompts) > MOST_PROMPTS or size > LONGEST_REQUEST:
            raise UserError(
                f"{len(request.prompts)} prompts of {size} characters or tokens are more than the cloud takes at once, "
                f"{MOST_PROMPTS} and {LONGEST_REQUEST}: ask for them in turn"
            )
        encoder = None
        if any(prompt.text for prompt in request.prompts):
            encoder = Encoder(backbone.tokenizer, request.template, backbone.config.max_position_embeddings)
        prompts = [
            encoder.prompt(prompt.text) if encoder is not None and prompt.text else list(prompt.tokens)
            for prompt in request.prompts
        ]
        if any(token >= backbone.config.vocab_size for prompt in prompts for token in prompt):
            raise UserError("the prompt holds tokens that this backbone has not")
        beams = None
        if request.HasField("beams"):
            early: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
            if request.beams.early_stopping not in early:
                raise UserError(f"early_stopping is '{request.beams.early_stopping}'; choices are {', '.join(early)}")
            stopping = early[request.beams.early_stopping]
            beams = Beams(request.beams.width, request.beams.length_penalty, stopping).check()  # type: ignore[arg-type]
        model = backbone.model(taps)
        codec, reply = wire.check_codec(request.codec), wire.check_reply(request.reply, beams is not None)
        config = CloudConfig(model, request.setting, codec, request.attends, reply, beams, backbone.eos_ids)
        lengths = check_lengths(prompts, request.max_new_tokens, backbone.config.max_position_embeddings)
        d, s = backbone.config.hidden_size, request.sampling
        return Plan(
            config,
            prompts,
            lengths,
            request.max_new_tokens,
            Sampling(s.temperature, s.top_k, s.top_p).check(),
            s.seed,
            _floats(request.router, (d, 2), "router") if request.setting in ROUTED else np.zeros((d, 2)),
            _floats(request.offset, (d,), "offset") if request.offset else np.zeros(d),
            request.threshold,
        )

    def pieces(self, generation: Generation) -> list[str]:
        """The text of each of its tokens."""
        return token_texts(self._backbone.tokenizer, generation.tokens)


def _floats(data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    if len(data) != 4 * int(np.prod(shape)):
        raise wire.WireError(f"the {name} has {len(data)} bytes, but one for this backbone has {4 * np.prod(shape)}")
    array = np.frombuffer(data, "<f4").reshape(shape)
    if not np.isfinite(array).all():
        raise wire.WireError(f"the {name} has numbers that are not finite")
    return array
