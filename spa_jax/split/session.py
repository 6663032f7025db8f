"""The cloud's side of a generation: the questions it asks the device, and how it uses the replies."""

import dataclasses
import uuid
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from spa_jax.chat import DATE
from spa_jax.data.detokenizing import token_texts
from spa_jax.data.encoding import Encoder
from spa_jax.data.padding import padded_length
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.cache import cache_bytes, count_slots
from spa_jax.decoding.hypotheses import Generation, to_generations
from spa_jax.decoding.prompts import check_lengths, check_tokens, pad_prompts
from spa_jax.decoding.sampling import Sampling
from spa_jax.decoding.settings import stop_tokens
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, SETTINGS, Edits
from spa_jax.models.llama import Entry, Params
from spa_jax.split import wire
from spa_jax.split.cloud import CloudConfig, RouterState, advance, correct_prompts, prefill
from spa_jax.split.messages_pb2 import Open, Reply, Taps
from spa_jax.split.opening import PromptQuestions, prompt_parts
from spa_jax.split.wire import Encoded
from spa_jax.weights.backbone import Backbone

MAX_PROMPTS, MAX_PROMPT_SIZE = 2**10, 2**18
"""Limits of a request: prompts, and their characters or tokens together; reading more would keep other sessions
waiting."""
MAX_COMPILED = 32
"""Shapes of generations whose compiled programs are kept; some ten MiB each."""


@jax.jit
def gather_taps(taps: Encoded, rows: Int[Array, " M"], slots: Int[Array, " M"]) -> Encoded:
    """Gathers `[M,P,D]` of the taps `[R,C,P,D]` that are kept."""
    return jax.tree.map(lambda leaf: leaf[rows, slots], taps)


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """A checked request, with all that its generation needs.

    Attributes:
        config: the static argument of the cloud's programs.
        prompts: token ids.
        lengths: tokens of each prompt.
        max_new_tokens: N.
        sampling: how to sample.
        seed: of sampling.
        kernel: the router's `[D,2]`.
        offset: the router's `[D]`.
        threshold: p(consult) above which the device is asked.
    """

    config: CloudConfig
    prompts: list[list[int]]
    lengths: Int[np.ndarray, " G"]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    kernel: np.ndarray
    offset: np.ndarray
    threshold: float

    @property
    def slots(self) -> int:
        """Cache slots of each prompt."""
        return count_slots(int(self.lengths.max()), self.max_new_tokens, self.config.width)

    @property
    def bytes(self) -> int:
        """Estimated memory: the cache, kept taps, and for each row its logits and some vectors of width D."""
        model, groups, width = self.config.model, len(self.prompts), self.config.width
        size = model.config
        taps = wire.bytes_per_position(self.config.codec, len(model.taps), size.hidden_size)
        vectors = 4 * (size.vocab_size + 8 * size.hidden_size)
        kept = taps * (int(self.lengths.max()) + self.max_new_tokens if self.config.attends else 1)
        total = cache_bytes(size, groups, self.slots, model.activation_dtype) + groups * width * (kept + vectors)
        if self.config.corrects_prompt:
            total += groups * int(self.lengths.max()) * (taps + 8 * size.hidden_size)
        return total


class Session:
    """One generation in the cloud. As long as `next_question` returns one, `apply_reply` must follow."""

    def __init__(self, plan: GenerationPlan, frozen: Params) -> None:
        """Runs the prompts, and on until the device is needed or all is generated."""
        self.id = uuid.uuid4().hex
        self.config = config = plan.config
        self.degraded = 0
        """Tokens that were chosen without the reply they waited for."""
        self.uncorrected_prompts = 0
        """Prompts that were to be corrected, and were not for want of a reply."""
        self._frozen = frozen
        groups, d = len(plan.prompts), config.model.config.hidden_size
        self._lengths, self._sampling = plan.lengths, plan.sampling
        router = RouterState(
            jnp.broadcast_to(jnp.asarray(plan.kernel, jnp.float32), (groups, d, 2)),
            jnp.full(groups, plan.threshold, jnp.float32),
            jnp.broadcast_to(jnp.asarray(plan.offset, jnp.float32), (groups, d)),
        )
        self._state, prompt_taps, states = prefill(
            config,
            frozen,
            router,
            pad_prompts(plan.prompts),
            plan.lengths,
            plan.seed,
            slots=plan.slots,
            max_new_tokens=plan.max_new_tokens,
        )
        self._step = self._base = 0
        rows = groups * config.width
        self._expects_tokens = config.reply == "token"
        no_g = wire.to_host(wire.encode(config.codec, jnp.zeros((rows, d))))
        self._no_reply: Encoded | np.ndarray = np.zeros(rows, np.int32) if self._expects_tokens else no_g
        self._asked_rows: np.ndarray = np.array([], np.int64)
        self._waiting = np.zeros(groups, bool)
        self._prompt_messages: list[Taps] = []
        self._prompt_questions: PromptQuestions | None = None
        if states is not None and prompt_taps is not None:
            self._prompt_questions = PromptQuestions(config, states, prompt_taps, plan.lengths)
        else:
            if prompt_taps is not None:
                self._prompt_messages = prompt_parts(wire.to_host(prompt_taps), plan.lengths - 1, config.width)
            self._advance(self._no_reply, self._waiting)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return self._lengths.tolist()

    def prompt_messages(self) -> list[Taps]:
        """Returns, once, messages with the prompts' taps (all positions but the last) for a device that attends."""
        messages, self._prompt_messages = self._prompt_messages, []
        return messages

    def next_question(self) -> Taps | None:
        """Makes the message that asks the device about a part of the prompts or about the waiting groups; None when the
        generation is over."""
        if self._prompt_questions is not None:
            self._step += 1
            return self._prompt_questions.ask(self._step)
        s = self._state
        waiting, consulted, unsent, origin, prompt_end, position, f = jax.device_get(
            (
                s.waiting,
                s.consulted,
                s.unsent,
                s.origin,
                s.last_prompt_position,
                s.position,
                s.states if self._expects_tokens else None,
            )
        )
        if not waiting.any():
            return None
        width = self.config.width
        self._asked_rows = np.flatnonzero(consulted & np.repeat(waiting, width))
        self._waiting = waiting
        to_send = np.zeros_like(unsent)
        to_send[self._asked_rows] = unsent[self._asked_rows]
        rows, slots = np.nonzero(to_send)
        first_position = np.repeat(prompt_end if self.config.attends else position - 1, width)
        padded = np.zeros((2, padded_length(len(rows), len(origin))), np.int32)
        padded[:, : len(rows)] = rows, slots
        taps = jax.tree.map(lambda leaf: leaf[: len(rows)], wire.to_host(gather_taps(s.taps, *padded)))
        self._step += 1
        is_reordered = self.config.attends and not np.array_equal(origin, np.arange(len(origin)))
        return Taps(
            step=self._step,
            base=self._base,
            rows=rows.tolist(),
            positions=(first_position[rows] + slots).tolist(),
            origins=origin.tolist() if is_reordered else [],
            taps=wire.pack(taps),
            f=wire.pack(Encoded(f[self._asked_rows].astype(np.float32), None)) if self._expects_tokens else None,
        )

    def apply_reply(self, reply: Reply | None) -> None:
        """Goes on with the device's reply to the last question, or without one.

        Raises:
            WireError: the reply is not one to that question; the session still waits for one.
        """
        if self._prompt_questions is not None:
            self._apply_to_prompts(self._prompt_questions, reply)
            return
        values, answered = self._no_reply, np.zeros_like(self._waiting)
        if reply is None:
            self.degraded += int(self._waiting.sum())
        else:
            self._check_step(reply)
            rows = len(self._waiting) * self.config.width
            received = self.read_reply(reply)
            values = jax.tree.map(lambda part: _scatter(part, self._asked_rows, rows), received)
            answered, self._base = self._waiting, self._step
        self._advance(values, answered)

    def _apply_to_prompts(self, questions: PromptQuestions, reply: Reply | None) -> None:
        """Goes on with the next part of the prompts, or when all are answered or one is not, with the generation."""
        if reply is not None:
            self._check_step(reply)
            questions.take(reply)
        if reply is None:
            self.uncorrected_prompts = len(self._lengths)
        if reply is None or not questions.left:
            self._open(answered=reply is not None)

    def _open(self, answered: bool) -> None:
        """Corrects the prompts with the device's answers, or not at all, and begins to generate.

        A device that attends and has not answered for all of them is sent the prompts as it is where they are never
        corrected.
        """
        questions, self._prompt_questions = self._prompt_questions, None
        assert questions is not None
        if self.config.attends and not answered:
            self._prompt_messages = prompt_parts(questions.taps, self._lengths - 1, self.config.width)
        self._state = correct_prompts(
            self.config, self._frozen, self._state, questions.states, questions.g, np.bool(answered)
        )
        self._advance(self._no_reply, np.zeros_like(self._waiting))

    def _check_step(self, reply: Reply) -> None:
        if reply.step != self._step:
            raise wire.WireError(f"a correction of step {reply.step} came where one of step {self._step} is due")

    def read_reply(self, reply: Reply) -> Encoded | np.ndarray:
        """Reads g `[M,D]`, or in reply mode `token` the tokens `[M]`, of the M rows of the last question.

        Raises:
            WireError: they are not for that many rows, or not valid.
        """
        rows, size = len(self._asked_rows), self.config.model.config
        if not self._expects_tokens:
            return wire.unpack(self.config.codec, reply.g, (rows, size.hidden_size))
        tokens = np.array(reply.tokens, np.int64)
        if len(tokens) != rows or (tokens >= size.vocab_size).any():
            raise wire.WireError(f"{len(tokens)} tokens came where {rows} below {size.vocab_size} are due")
        return tokens.astype(np.int32)

    def _advance(self, reply: Encoded | np.ndarray, answered: np.ndarray) -> None:
        self._state = advance(self.config, self._frozen, self._state, reply, self._waiting, answered, self._sampling)

    def result(self) -> list[Generation]:
        """Fetches what is generated so far."""
        return to_generations(self._state.hypotheses, self.config.eos_ids)

    def free(self) -> None:
        """Frees the memory of a session that is over."""
        del self._state


def _scatter(part: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Puts values `[M,...]` at these of `count` rows, with zeros at the others."""
    scattered = np.zeros((count, *part.shape[1:]), part.dtype)
    scattered[rows] = part
    return scattered


class Cloud:
    """A backbone that opens sessions, each the cloud's side of one generation.

    >>> from spa_jax import Cloud, load_backbone, load_plugin
    >>> from spa_jax.split.generation import generate
    >>> from spa_jax.split.request import open_message
    >>> plugin = load_plugin("runs/mine/plugin")
    >>> request = open_message(plugin, ["What is thing 3?"], max_new_tokens=8)
    >>> result = generate(Cloud(load_backbone(plugin.backbone)), plugin, request)
    >>> len(result.generations[0].tokens) <= 8, result.degraded
    (True, 0)
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._compiled: set[tuple[object, ...]] = set()

    def open(self, request: Open) -> Session:
        """Begins a generation: runs the prompts, and on until the device is needed.

        Raises:
            UserError: another protocol version, backbone, or a request that makes no sense, each by name.
        """
        return self.begin(self.plan(request))

    def begin(self, plan: GenerationPlan) -> Session:
        """Opens the session of a plan; beyond `MAX_COMPILED` shapes, all compiled programs are dropped first."""
        shape = (plan.config, plan.slots, plan.max_new_tokens, pad_prompts(plan.prompts).shape)
        if shape not in self._compiled and len(self._compiled) >= MAX_COMPILED:
            for program in (prefill, correct_prompts, advance, gather_taps):
                program.clear_cache()  # type: ignore[attr-defined]
            self._compiled.clear()
        self._compiled.add(shape)
        return Session(plan, self._backbone.params)

    def plan(self, request: Open) -> GenerationPlan:
        """Checks a request and says what its generation takes, before anything is computed.

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
        states = backbone.config.num_layers + 1
        entry: Entry = request.entry if request.HasField("entry") else "head"
        if entry != "head" and entry >= backbone.config.num_layers:
            raise UserError(f"the device's corrections enter in front of block {entry}, which this backbone has not")
        if request.edits not in get_args(Edits):
            raise UserError(f"edits '{request.edits}' are unknown; choices are {', '.join(get_args(Edits))}")
        if request.edits == "all" and (entry == "head" or request.offset):
            raise UserError(
                "edits 'all' need corrections that enter in front of a block, and a router without an offset: the "
                f"device asks for them at the entry {entry}{' with an offset' if request.offset else ''}"
            )
        states = states if entry == "head" else entry + 1
        if not 0 < len(taps) <= states or list(taps) != sorted(set(taps)) or taps[-1] >= states:
            few = taps[: states + 1]
            raise UserError(f"the device asks for taps {few}, which this backbone has not below the entry")
        prompts = self._tokenize(request)
        beams = _beams(request) if request.HasField("beams") else None
        codec, reply = wire.check_codec(request.codec), wire.check_reply(request.reply, beams is not None, entry)
        model = backbone.model(taps, entry=entry)
        asks = request.setting != "base" and not (request.setting in ROUTED and request.threshold >= 1)
        corrects_prompt = request.edits == "all" and asks
        config = CloudConfig(
            model, request.setting, codec, request.attends, reply, beams, stop_tokens(backbone, request.template),
            corrects_prompt,
        )  # fmt: skip
        lengths = check_lengths(prompts, request.max_new_tokens, backbone.config.max_position_embeddings)
        check_tokens(prompts, backbone.config.vocab_size)
        d, s = backbone.config.hidden_size, request.sampling
        return GenerationPlan(
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

    def token_texts(self, generation: Generation, ended: bool = True) -> list[str]:
        """Returns the text of each token, see `spa_jax.data.detokenizing.token_texts`."""
        return token_texts(self._backbone.tokenizer, generation.tokens, ended)

    def _tokenize(self, request: Open) -> list[list[int]]:
        """Returns the token ids of the prompts.

        Raises:
            UserError: too many or too long prompts, or text that its template cannot write.
        """
        backbone = self._backbone
        size = sum(len(prompt.text) + len(prompt.tokens) for prompt in request.prompts)
        if len(request.prompts) > MAX_PROMPTS or size > MAX_PROMPT_SIZE:
            raise UserError(
                f"{len(request.prompts)} prompts of {size} characters or tokens are more than the cloud takes at once, "
                f"{MAX_PROMPTS} and {MAX_PROMPT_SIZE}: ask for them in turn"
            )
        encoder = None
        if any(prompt.text for prompt in request.prompts):
            limit, date = backbone.config.max_position_embeddings, request.date or DATE
            encoder = Encoder(backbone.tokenizer, request.template, limit, date=date)
        prompts = [
            encoder.prompt(prompt.text) if encoder is not None and prompt.text else list(prompt.tokens)
            for prompt in request.prompts
        ]
        return prompts


def _beams(request: Open) -> Beams:
    """Reads the beam search of a request.

    Raises:
        UserError: a width or a way to stop that does not exist.
    """
    early: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    if request.beams.early_stopping not in early:
        raise UserError(f"early_stopping is '{request.beams.early_stopping}'; choices are {', '.join(early)}")
    stopping = early[request.beams.early_stopping]
    return Beams(request.beams.width, request.beams.length_penalty, stopping).check()  # type: ignore[arg-type]


def _floats(data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Reads a float32 array of that shape.

    Raises:
        WireError: the bytes are not of that many numbers, or not all of them are finite.
    """
    if len(data) != 4 * int(np.prod(shape)):
        raise wire.WireError(f"the {name} has {len(data)} bytes, but one for this backbone has {4 * np.prod(shape)}")
    array = np.frombuffer(data, "<f4").reshape(shape)
    if not np.isfinite(array).all():
        raise wire.WireError(f"the {name} has numbers that are not finite")
    return array
