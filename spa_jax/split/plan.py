"""Plans of generations: a device's request, checked, and what it takes, before anything is computed."""

import dataclasses
import functools
from typing import get_args

import numpy as np
from jaxtyping import Int

from spa_jax.chat import DATE
from spa_jax.choices import SETTINGS
from spa_jax.data.encoding import Encoder
from spa_jax.data.pairs import Role, Turn
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.prompts import check_lengths, check_tokens
from spa_jax.decoding.sampling import Penalties, Sampling
from spa_jax.decoding.settings import stop_tokens
from spa_jax.engine.group import Task
from spa_jax.errors import UserError
from spa_jax.models.combine import ADDED, ROUTED, Edits
from spa_jax.models.llama import Entry
from spa_jax.split import memory, wire
from spa_jax.split.admission import COST_OF_NEW
from spa_jax.split.messages_pb2 import Open, Prompt
from spa_jax.split.wire import Codec, ReplyMode
from spa_jax.weights.backbone import Backbone

MAX_BEAMS = 8
"""Most hypotheses of a prompt, so that one call is enough for those of several sessions."""
MAX_PROMPTS, MAX_MESSAGES, MAX_PROMPT_SIZE = 2**10, 2**12, 2**18
"""Limits of a request: prompts, and their characters or tokens together; reading more would keep other sessions
waiting."""
MAX_STOPS, MAX_STOP_SIZE = 16, 2**10
"""Limits of the texts that end an answer: how many, and their characters together."""
MAX_SECRET = 64
"""Most bytes of the secret by which a device names its corrected prompts."""
ROLES = get_args(Role)


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """A checked request, with all that its generation needs.

    Attributes:
        task: what it asks of the engine.
        prompts: token ids.
        lengths: tokens of each prompt.
        codec: how numbers travel.
        reply: what the device answers with.
        stop: texts that end an answer.
        bytes: the most memory that it takes, with what it needs while its prompts run.
        reply_bytes: the most that a message with a reply has.
    """

    task: Task
    prompts: list[list[int]]
    lengths: Int[np.ndarray, " G"]
    codec: Codec
    reply: ReplyMode
    stop: tuple[str, ...]
    bytes: int
    reply_bytes: int

    @property
    def cost(self) -> float:
        """The work of the prompts and of as many new tokens as there may be, in tokens of a prompt."""
        return int(self.lengths.sum()) + COST_OF_NEW * len(self.prompts) * self.task.limit


def plan_generation(backbone: Backbone, request: Open, unit_bytes: int) -> GenerationPlan:
    """Checks a request and says what its generation takes, before anything is computed.

    Args:
        backbone: of the cloud.
        request: of the device.
        unit_bytes: memory of a unit of the engine's cache.

    Raises:
        UserError: another protocol version, backbone, or a request that makes no sense, each by name.
    """
    if request.version != wire.VERSION:
        raise UserError(
            f"the device speaks version {request.version} of the protocol and the cloud version {wire.VERSION}: "
            "install the same spa_jax on both"
        )
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
    if len(request.own) > MAX_SECRET:
        raise UserError(f"the secret that a device names its corrected prompts by has more than {MAX_SECRET} bytes")
    prompts = _tokenize(backbone, request)
    beams = _beams(request) if request.HasField("beams") else None
    codec, reply = wire.check_codec(request.codec), wire.check_reply(request.reply, beams is not None, entry)
    asks = request.setting != "base" and not (request.setting in ROUTED and request.threshold >= 1)
    lengths = check_lengths(prompts, request.max_new_tokens, backbone.config.max_position_embeddings)
    check_tokens(prompts, backbone.config.vocab_size)
    d, s, routed = backbone.config.hidden_size, request.sampling, request.setting in ROUTED
    task = Task(
        kernel=_floats(request.router, (d, 2), "router") if routed else np.zeros((d, 2), np.float32),
        offset=_floats(request.offset, (d,), "offset") if request.offset and routed else np.zeros(d, np.float32),
        threshold=request.threshold,
        routed=routed,
        asks=asks,
        adds=request.setting in ADDED,
        entry=backbone.config.num_layers if entry == "head" else entry,
        enters_at_head=entry == "head",
        taps=taps,
        attends=request.attends,
        corrects_prompt=request.edits == "all" and asks,
        eos_ids=stop_tokens(backbone, request.template),
        limit=request.max_new_tokens,
        sampling=Sampling(s.temperature, s.top_k, s.top_p).check(),
        seed=s.seed,
        beams=beams,
        keep=functools.partial(wire.encode, codec),
        penalties=Penalties(s.frequency_penalty, s.presence_penalty).check(),
        scored=request.scored,
        own=request.own,
    )
    stop = _stop_texts(request)
    if beams is not None and (stop or any(task.penalties)):
        raise UserError("a beam search takes no texts that end an answer and no penalties: leave them or it out")
    sizes = backbone.config, task, lengths.tolist(), codec
    total = memory.kept_bytes(*sizes, unit_bytes) + memory.passing_bytes(*sizes)
    reply_bytes = memory.reply_bytes(backbone.config, task, len(prompts), codec)
    return GenerationPlan(task, prompts, lengths, codec, reply, stop, total, reply_bytes)


def _tokenize(backbone: Backbone, request: Open) -> list[list[int]]:
    """Returns the token ids of the prompts.

    Raises:
        UserError: too many or too long prompts, one that is nothing or a conversation that asks nothing, or text
            that its template cannot write.
    """
    size = sum(map(_size, request.prompts))
    if len(request.prompts) > MAX_PROMPTS or size > MAX_PROMPT_SIZE:
        raise UserError(
            f"{len(request.prompts)} prompts of {size} characters or tokens are more than the cloud takes at once, "
            f"{MAX_PROMPTS} and {MAX_PROMPT_SIZE}: ask for them in turn"
        )
    messages = sum(len(prompt.messages) for prompt in request.prompts)
    if messages > MAX_MESSAGES:
        raise UserError(
            f"{messages} messages of conversations are more than the cloud takes at once, {MAX_MESSAGES}: leave out "
            "the oldest"
        )
    limit, special = backbone.config.max_position_embeddings, request.reads_special

    @functools.cache
    def encoder() -> Encoder:
        date = request.date or DATE
        return Encoder(backbone.tokenizer, request.template, limit, date=date, reads_special=special)

    def tokens(prompt: Prompt) -> list[int]:
        if prompt.messages:
            if {message.role for message in prompt.messages} - set(ROLES):
                raise UserError(f"a message has an unknown role: choices are {', '.join(ROLES)}")
            turns = [(Turn(message.role, message.content), list(message.tokens)) for message in prompt.messages]  # type: ignore[arg-type]
            return encoder().conversation(turns)
        if not prompt.text:
            return list(prompt.tokens)
        return encoder().raw(prompt.text) if prompt.raw else encoder().prompt(prompt.text)

    return [tokens(prompt) for prompt in request.prompts]


def _size(prompt: Prompt) -> int:
    """Counts the characters and tokens of a prompt."""
    texts = [prompt.text, *(message.content for message in prompt.messages)]
    return sum(map(len, texts)) + len(prompt.tokens) + sum(1 + len(message.tokens) for message in prompt.messages)


def _stop_texts(request: Open) -> tuple[str, ...]:
    """Reads the texts that end an answer.

    Raises:
        UserError: there are too many or too long ones, or an empty one.
    """
    stop = tuple(request.stop)
    if len(stop) > MAX_STOPS or sum(map(len, stop)) > MAX_STOP_SIZE or not all(stop):
        raise UserError(
            f"an answer may be ended by at most {MAX_STOPS} texts of {MAX_STOP_SIZE} characters together, and by no "
            "empty one"
        )
    return stop


def _beams(request: Open) -> Beams:
    """Reads the beam search of a request.

    Raises:
        UserError: a width or a way to stop that does not exist, or a width above `MAX_BEAMS`.
    """
    if request.beams.width > MAX_BEAMS:
        raise UserError(
            f"the device asks for {request.beams.width} beams, and a cloud searches with at most {MAX_BEAMS}: ask for "
            "fewer, or generate in one program (--channel=none)"
        )
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
