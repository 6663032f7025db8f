"""The cloud's side of a generation: the questions it asks the device, and how it uses the replies."""

import uuid
import weakref
from collections.abc import Iterator

import jax
import numpy as np

from spa_jax.data.detokenizing import AnswerText
from spa_jax.decoding.hypotheses import Generation
from spa_jax.engine.engine import Engine
from spa_jax.engine.group import Group, Phase
from spa_jax.split import wire
from spa_jax.split.messages_pb2 import Open, Reply, Taps
from spa_jax.split.opening import PromptQuestions, prompt_parts
from spa_jax.split.plan import GenerationPlan, plan_generation
from spa_jax.split.wire import Encoded
from spa_jax.weights.backbone import Backbone


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
        """Checks a request and says what its generation takes, as `plan_generation`."""
        return plan_generation(self._backbone, request, self.engine.slots.unit_bytes)
