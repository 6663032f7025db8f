"""The cloud's side of a generation: the questions it asks the device, and how it uses the replies."""

import dataclasses
import functools
import uuid
import weakref
from collections.abc import Iterator
from typing import get_args

import jax
import numpy as np
from jaxtyping import Int

from spa_jax.chat import DATE
from spa_jax.choices import SETTINGS
from spa_jax.data.detokenizing import AnswerText
from spa_jax.data.encoding import Encoder
from spa_jax.data.pairs import Role, Turn
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.hypotheses import Generation
from spa_jax.decoding.prompts import check_lengths, check_tokens
from spa_jax.decoding.sampling import Penalties, Sampling
from spa_jax.decoding.settings import stop_tokens
from spa_jax.engine.engine import Engine
from spa_jax.engine.group import Group, Phase, Task
from spa_jax.errors import UserError
from spa_jax.models.combine import ADDED, ROUTED, Edits
from spa_jax.models.llama import Entry
from spa_jax.split import memory, wire
from spa_jax.split.admission import COST_OF_NEW
from spa_jax.split.messages_pb2 import Open, Prompt, Reply, Taps
from spa_jax.split.opening import PromptQuestions, prompt_parts
from spa_jax.split.wire import Codec, Encoded, ReplyMode
from spa_jax.weights.backbone import Backbone

MAX_BEAMS = 8
"""Most hypotheses of a prompt, so that one call is enough for those of several sessions."""
MAX_PROMPTS, MAX_PROMPT_SIZE = 2**10, 2**18
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


class Session:
    """One generation in the cloud. As long as `next_question` returns one, `apply_reply` must follow."""

    def __init__(self, plan: GenerationPlan, engine: Engine, texts: list[AnswerText], namespace: str | None) -> None:
        """Joins the engine; its prompts run when that turns. `texts` are those of the answers, empty yet.

        Raises:
            NoRoom: the engine cannot take it now.
        """
        self.id = uuid.uuid4().hex
        self.plan = plan
        self.degraded = 0
        """Tokens that were chosen without the reply they waited for."""
        self.uncorrected_prompts = 0
        """Prompts that were to be corrected, and were not for want of a reply."""
        self.texts = texts
        self._engine, self._task = engine, plan.task
        self._groups = engine.add(plan.task, plan.prompts, namespace)
        weakref.finalize(self, _leave, self._groups)
        self._step = self._base = 0
        self._asked: list[tuple[Group, np.ndarray]] = []
        self._questions: PromptQuestions | None = None
        self._sends_prompt = plan.task.attends and plan.task.asks and not plan.task.corrects_prompt

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return self.plan.lengths.tolist()

    @property
    def is_settled(self) -> bool:
        """Whether the engine can do no more for it before a reply, if ever."""
        settled = (Phase.WAITING, Phase.OPENING, Phase.OVER)
        return all(group.is_left or group.phase in settled for group in self._groups)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be generated."""
        return all(group.is_left or group.phase is Phase.OVER for group in self._groups)

    def settle(self) -> None:
        """Turns the engine until it can do no more for this session."""
        while not self.is_settled:
            self._engine.turn()
            if self.plan.stop:
                self.read()

    def read(self, is_over: bool = False) -> None:
        """Reads the tokens that are new as text, and ends the answers that have come to a text that ends them; those of
        a search, which may still become others, only when it `is_over`."""
        if self._task.beams is not None and not is_over:
            return
        for group, text in zip(self._groups, self.texts):
            if not text.is_stopped:
                text.read(group.generation().tokens, is_over)
                group.is_left |= text.is_stopped

    def prompt_messages(self) -> Iterator[Taps]:
        """Yields, once, messages with the prompts' taps (all positions but the last) for a device that attends. Each
        prompt's are forgotten as soon as they are in messages, so that little is there twice."""
        if not self._sends_prompt:
            return
        self.settle()
        self._sends_prompt = False
        for group in self._groups:
            yield from prompt_parts(group, len(group.prompt) - 1)
            group.prompt_taps = []

    def next_question(self) -> Taps | None:
        """Makes the message that asks the device about a part of the prompts or about the waiting groups; None when the
        generation is over."""
        self.settle()
        if self._questions is None and any(
            group.phase is Phase.OPENING and not group.is_left for group in self._groups
        ):
            self._questions = PromptQuestions(self._groups, self.plan.codec)
        if self._questions is not None:
            self._step += 1
            return self._questions.ask(self._step)
        width = self._task.width
        self._asked = [(group, np.flatnonzero(group.asked)) for group in self._groups if _waits(group)]
        if not self._asked:
            return None
        rows, positions, taps = [], [], []
        for group, columns in self._asked:
            for column in columns.tolist():
                for position, kept in group.hypotheses[column].unsent:
                    rows.append(group.number * width + column)
                    positions.append(position)
                    taps.append(kept)
        origins = [group.number * width + each.origin for group in self._groups for each in group.hypotheses[:width]]
        is_reordered = self._task.attends and origins != list(range(len(origins)))
        f = np.concatenate([group.state[columns] for group, columns in self._asked]).astype(np.float32)
        self._step += 1
        return Taps(
            step=self._step,
            base=self._base,
            rows=rows,
            positions=positions,
            origins=origins if is_reordered else [],
            taps=wire.pack(jax.tree.map(lambda *leaves: np.stack(leaves), *taps)),
            f=wire.pack(Encoded(f, None)) if self.plan.reply == "token" else None,
        )

    def apply_reply(self, reply: Reply | None) -> None:
        """Goes on with the device's reply to the last question, or without one.

        Raises:
            WireError: the reply is not one to that question; the session still waits for one.
        """
        if reply is not None and reply.step != self._step:
            raise wire.WireError(f"a correction of step {reply.step} came where one of step {self._step} is due")
        if self._questions is not None:
            self._apply_to_prompts(self._questions, reply)
        elif reply is None:
            self.degraded += len(self._asked)
            for group, _ in self._asked:
                group.answer(None)
        else:
            counts = [len(columns) for _, columns in self._asked]
            values = np.split(self._read(reply, sum(counts)), np.cumsum(counts)[:-1])
            self._base = self._step
            for (group, columns), part in zip(self._asked, values):
                if self.plan.reply == "token":
                    group.answer(None, int(part[0]))
                else:
                    g = np.zeros(group.state.shape, np.float32)
                    g[columns] = part
                    group.answer(g)

    def _apply_to_prompts(self, questions: PromptQuestions, reply: Reply | None) -> None:
        """Goes on with the next part of the prompts, or when all are answered or one is not, with the generation.

        A device that attends and has not answered for all of them is sent the prompts as it is where they are never
        corrected.
        """
        if reply is not None:
            questions.take(reply)
            if questions.left:
                return
        else:
            self.uncorrected_prompts = len(self._groups)
        self._sends_prompt = self._task.attends and reply is None
        questions.end(answered=reply is not None, keeps_taps=self._sends_prompt)
        self._questions = None

    def _read(self, reply: Reply, rows: int) -> np.ndarray:
        """Reads g `[M,D]`, or in reply mode `token` the tokens `[M]`, of the M rows of the last question.

        Raises:
            WireError: they are not for that many rows, or not valid.
        """
        if self.plan.reply == "correction":
            g = wire.unpack(self.plan.codec, reply.g, (rows, len(self._task.offset)))
            return wire.decode(g, np.float32)
        tokens, vocabulary = np.array(reply.tokens, np.int64), self._engine.vocabulary
        if len(tokens) != rows or (tokens >= vocabulary).any():
            raise wire.WireError(f"{len(tokens)} tokens came where {rows} below {vocabulary} are due")
        return tokens

    def result(self) -> list[Generation]:
        """Returns what is generated so far, without what follows a text that ends an answer, or may be one."""
        found = []
        for group, text in zip(self._groups, self.texts):
            each = group.generation()
            found.append(each.first(text.num_tokens(len(each.tokens))))
        return found

    @property
    def num_generated(self) -> int:
        """New tokens so far, of all prompts; of a search, those of its longest hypotheses."""
        return sum(group.generated for group in self._groups)

    def free(self) -> None:
        """Leaves the engine."""
        _leave(self._groups)


def _waits(group: Group) -> bool:
    return group.phase is Phase.WAITING and not group.is_left


def _leave(groups: list[Group]) -> None:
    """Leaves groups wherever they are; the engine drops those that it has not dropped yet at its next turn."""
    for group in groups:
        group.is_left = True
        if group.phase is Phase.OVER:
            group.prompt_taps = []


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
        self.engine = Engine(backbone)

    @property
    def fingerprint(self) -> str:
        """Of the backbone."""
        return self._backbone.fingerprint

    def open(self, request: Open) -> Session:
        """Begins a generation.

        Raises:
            UserError: another protocol version, backbone, or a request that makes no sense, each by name.
        """
        return self.begin(self.plan(request))

    def begin(self, plan: GenerationPlan, namespace: str | None = "") -> Session:
        """Opens the session of a plan, which shares what prompts begin with within a namespace; None for no sharing.

        Raises:
            NoRoom: the engine cannot take it now.
        """
        texts = [AnswerText(self._backbone.tokenizer, plan.stop) for _ in plan.prompts]
        return Session(plan, self.engine, texts, namespace)

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
        if len(request.own) > MAX_SECRET:
            raise UserError(f"the secret that a device names its corrected prompts by has more than {MAX_SECRET} bytes")
        prompts = self._tokenize(request)
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
        total = memory.kept_bytes(*sizes, self.engine.slots.unit_bytes) + memory.passing_bytes(*sizes)
        reply_bytes = memory.reply_bytes(backbone.config, task, len(prompts), codec)
        return GenerationPlan(task, prompts, lengths, codec, reply, stop, total, reply_bytes)

    def _tokenize(self, request: Open) -> list[list[int]]:
        """Returns the token ids of the prompts.

        Raises:
            UserError: too many or too long prompts, one that is nothing or a conversation that asks nothing, or text
                that its template cannot write.
        """
        backbone = self._backbone
        size = sum(map(_size, request.prompts))
        if len(request.prompts) > MAX_PROMPTS or size > MAX_PROMPT_SIZE:
            raise UserError(
                f"{len(request.prompts)} prompts of {size} characters or tokens are more than the cloud takes at once, "
                f"{MAX_PROMPTS} and {MAX_PROMPT_SIZE}: ask for them in turn"
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
