"""The cloud's side of a generation: what it asks of the device, and what it makes of the answers."""

import uuid

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from spa_jax.data.encoding import Encoder
from spa_jax.data.pipeline import bucket
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import pad_prompts
from spa_jax.decoding.hypotheses import Generation, generations
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, SETTINGS
from spa_jax.models.llama import Llama, Params
from spa_jax.split import wire
from spa_jax.split.cloud import CloudConfig, RouterState, advance, prefill
from spa_jax.split.messages_pb2 import Correction, Open, Prompt, Taps
from spa_jax.split.wire import Encoded
from spa_jax.weights.backbone import Backbone

CHUNK_POSITIONS = 64
"""Prompt positions a message brings to a side network that attends."""


@jax.jit
def _select(taps: Encoded, rows: Int[Array, " M"], slots: Int[Array, " M"]) -> Encoded:
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
        padded = np.zeros((2, bucket(len(rows), len(origin))), np.int32)
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
