"""One prompt with its hypotheses on the host: what it asks for, how far it is, and what it has said.

Shape letters: K hypotheses, T prompt tokens, P taps, D width.
"""

import dataclasses
import enum
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from spa_jax.decoding.beam import Beams, Ranking
from spa_jax.decoding.hypotheses import IMPOSSIBLE, Generation
from spa_jax.decoding.sampling import NO_PENALTIES, Penalties, Sampling
from spa_jax.engine.extents import power_of_two


@dataclasses.dataclass(frozen=True)
class Task:
    """A session's request, as the engine runs it.

    Attributes:
        kernel: the router's `[D,2]`.
        offset: the router's `[D]`, zero where it has none.
        threshold: p(consult) above which the device is asked.
        routed: whether the router decides.
        asks: whether the device is ever asked.
        adds: whether g is added to the state or replaces it.
        entry: the block in front of which corrections enter, L for `head`.
        enters_at_head: whether that is `head`.
        taps: the hidden states that the device reads.
        attends: whether it reads those of all tokens.
        corrects_prompt: whether it corrects all of the prompt before the first new token.
        eos_ids: tokens that end a generation.
        limit: most new tokens.
        sampling: how to sample.
        seed: of sampling.
        beams: how to search; None to sample.
        keep: makes of taps `[...,D]` on the host, float32, what is kept of them until they are sent.
        penalties: of tokens that the answer has.
        scored: whether log-probabilities are wanted.
        own: a secret of whoever may go on with its corrected prompts; empty for nobody.
    """

    kernel: Float[np.ndarray, "D 2"]
    offset: Float[np.ndarray, " D"]
    threshold: float
    routed: bool
    asks: bool
    adds: bool
    entry: int
    enters_at_head: bool
    taps: tuple[int, ...]
    attends: bool
    corrects_prompt: bool
    eos_ids: tuple[int, ...]
    limit: int
    sampling: Sampling
    seed: int
    beams: Beams | None
    keep: Callable[[np.ndarray], Any]
    penalties: Penalties = NO_PENALTIES
    scored: bool = False
    own: bytes = b""

    @property
    def width(self) -> int:
        """Hypotheses of each prompt."""
        return self.beams.width if self.beams else 1

    @property
    def columns(self) -> int:
        """Hypotheses that programs compute, K: one, or a power of two from 2 on."""
        return max(2, power_of_two(self.beams.width)) if self.beams else 1

    def count_slots(self, length: int) -> int:
        """Counts the cache slots of a prompt of so many tokens with all that may follow."""
        return length + self.limit * self.columns


class Phase(enum.Enum):
    """The states of a group, by what it needs next."""

    PROMPT = "its prompt is run"
    OPENING = "an answer about all of its prompt"
    READY = "a step"
    WAITING = "an answer about its newest tokens"
    OVER = "nothing"


@dataclasses.dataclass
class Hypothesis:
    """A text so far.

    Attributes:
        tokens: new ones.
        consulted: for each, whether the device was asked for it.
        probabilities: for each, p(consult).
        logprobs: for each, its log-probability in nats, NaN where it is not known.
        waits: for each, the seconds that the question about it was out; 0 where none was.
        origin: the hypothesis that it descends from at the last answered question.
        unsent: position and kept taps `[P,D]` of the tokens that the device has not been told about; of one that does
            not attend, of the newest alone.
    """

    tokens: list[int]
    consulted: list[bool]
    probabilities: list[float]
    logprobs: list[float]
    waits: list[float]
    origin: int
    unsent: list[tuple[int, Any]]

    def extended(
        self, token: int, consulted: bool, probability: float, logprob: float = math.nan, wait: float = 0.0
    ) -> "Hypothesis":
        """Returns a copy with one more token."""
        return Hypothesis(
            [*self.tokens, token],
            [*self.consulted, consulted],
            [*self.probabilities, probability],
            [*self.logprobs, logprob],
            [*self.waits, wait],
            self.origin,
            list(self.unsent),
        )


class Group:
    """A prompt and its hypotheses.

    Attributes:
        task: what its session asks for.
        number: its index within the session.
        prompt: token ids.
        entry: as of the task, or that of others where it makes no difference.
        phase: what it needs next.
        is_left: whether its session is gone, so that nobody wants it any more.
        since: when it came, or a call last served it, on the engine's clock of calls.
        waits_since: when it last began to wait for an answer, on `time.monotonic`'s clock.
        extent: its slots in the cache.
        namespace: of those with whom it shares what it begins with; None for nobody.
        first: position of the first token of the prompt's next part.
        skipped: tokens of a prompt that is corrected which were so before, for another session.
        is_opened: whether the device has corrected the prompt, or failed to.
        prompt_taps: kept taps `[T,P,D]` of a device that reads those of the prompt.
        prompt_states: `[T,D]` at the entry, of a prompt that is corrected.
        prompt_g: the device's correction of it `[T,D]`; None where there is none.
        state: `[K,D]` of the newest tokens at the entry.
        asked: the hypotheses whose newest token the device is asked about.
        probability: p(consult) of these tokens `[K]`.
        g: its answer, None if there is none.
        token: the next token, where the device chose it.
        scores, finished_scores: of a search.
        seen: the slots of the extent that each hypothesis of a search attends to.
        hypotheses: the texts so far.
        finished: those of a search that have ended, best first.
    """

    def __init__(
        self, task: Task, number: int, prompt: Sequence[int], entry: int, extent: range, namespace: str | None = None
    ) -> None:
        columns = task.columns
        self.task, self.number, self.prompt, self.entry, self.extent = task, number, prompt, entry, extent
        self.namespace = namespace
        self.phase, self.since, self.is_left = Phase.PROMPT, 0, False
        self.waits_since, self._waits, self._waited = 0.0, [math.inf], 0.0
        self.first, self.skipped, self.is_opened, self._is_given_up = 0, 0, False, False
        self.prompt_taps: Any = []
        self.prompt_states: Any = []
        self.prompt_g: np.ndarray | None = None
        self.state: Float[np.ndarray, "K D"] = np.zeros(0)
        self.asked: Bool[np.ndarray, " K"] = np.zeros(columns, bool)
        self.probability: Float[np.ndarray, " K"] = np.zeros(columns, np.float32)
        self.g: Float[np.ndarray, "K D"] | None = None
        self.token: int | None = None
        self.scores: Any = np.where(np.arange(columns) == 0, 0, IMPOSSIBLE).astype(np.float32)
        self.finished_scores: Any = np.full(columns, IMPOSSIBLE, np.float32)
        self.seen: Any = None
        if task.beams is not None:
            self.seen = np.broadcast_to(np.arange(len(extent)) < len(prompt), (columns, len(extent)))
        self.hypotheses = [Hypothesis([], [], [], [], [], 0, []) for _ in range(columns)]
        self.finished: list[Hypothesis | None] = [None] * columns

    @property
    def generated(self) -> int:
        """New tokens of each hypothesis."""
        return len(self.hypotheses[0].tokens)

    @property
    def position(self) -> int:
        """Position of the newest token."""
        return len(self.prompt) + self.generated - 1

    @property
    def keeps_all_taps(self) -> bool:
        """Whether the taps of every token are kept until they are sent."""
        return self.task.attends and self.task.asks

    @property
    def reads_prompt(self) -> bool:
        """Whether the device reads the taps of all of the prompt."""
        return self.keeps_all_taps or self.task.corrects_prompt

    @property
    def root(self) -> Hashable | None:
        """Says with whom it may share keys and values of its prompt, but for the last token; None for nobody. They are
        the backbone's own, or corrected, for a device without memory and its side network alone."""
        task = self.task
        if self.namespace is None or not task.corrects_prompt:
            return self.namespace
        is_alone = task.attends or not task.own or self._is_given_up
        return None if is_alone else (self.namespace, task.own, task.adds, task.entry)

    @property
    def keeps_prompt(self) -> bool:
        """Whether keys and values of its prompt are what `root` says."""
        return self.root is not None and (not self.task.corrects_prompt or self.prompt_g is not None)

    @property
    def shares_all(self) -> bool:
        """Whether those of its new tokens are, too: corrections reach them only through the choice of tokens."""
        is_untouched = not self.task.asks and not self.task.offset.any()
        shares_prompt = self.namespace is not None and not self.task.corrects_prompt
        return shares_prompt and self.task.columns == 1 and (self.task.enters_at_head or is_untouched)

    @property
    def reuses_prompt(self) -> bool:
        """Whether it can begin behind what was run before, which has no taps for a device that reads those of all."""
        return self.root is not None and not self.keeps_all_taps

    def end_prompt(self, state: Float[np.ndarray, " D"], is_asked: bool, probability: float, clock: int) -> None:
        """Takes the state of the prompt's last token at the entry, whether the device is asked about that, and
        p(consult)."""
        self.probability = np.full(self.task.columns, probability, np.float32)
        if self.task.corrects_prompt:
            before = np.zeros((self.skipped, len(state)), state.dtype)
            self.prompt_states = np.concatenate([before, *self.prompt_states])
            self.phase = Phase.OPENING
            if self._is_given_up:
                self.open(None)
            return
        columns = np.arange(self.task.columns)
        self.state = np.broadcast_to(state, (len(columns), len(state)))
        self.settle(is_asked & (columns == 0), clock)

    def end_opening(self) -> None:
        """Goes on with a prompt that was to be corrected, from its last token on."""
        g, columns = self.prompt_g, self.task.columns
        self.state = np.broadcast_to(self.prompt_states[-1], (columns, self.prompt_states.shape[1]))
        self.asked = (np.arange(columns) == 0) & (g is not None)
        if g is not None:
            self.g = np.broadcast_to(g[-1], self.state.shape)
            for hypothesis in self.hypotheses:
                hypothesis.unsent = []
        self.prompt_states, self.phase = [], Phase.READY

    @property
    def usual_wait(self) -> float:
        """How many seconds an answer takes: the lesser of the last two waits, since the first may have compiled a
        program; infinite where nothing is known."""
        return min(self._waits)

    def settle(self, asked: Bool[np.ndarray, " K"], clock: int) -> None:
        """Waits if the device is asked about one of the newest tokens; otherwise it is ready for a step."""
        self.asked, self.since, self.waits_since = asked, clock, time.monotonic()
        self.phase = Phase.WAITING if asked.any() else Phase.READY

    def answer(self, g: Float[np.ndarray, "K D"] | None, token: int | None = None) -> None:
        """Takes the device's answer about the newest tokens: g, or the next token, or nothing."""
        is_answered = g is not None or token is not None
        self._waited = time.monotonic() - self.waits_since
        self._waits = [self._waits[-1], self._waited]
        if is_answered:
            self.begin_anew(self.asked)
        self.g, self.token = g, token
        self.asked = self.asked & is_answered
        self.phase = Phase.READY

    def begin_anew(self, told: Bool[np.ndarray, " K"]) -> None:
        """Takes note that the device knows the hypotheses by their present numbers, and the taps of those `told`."""
        for column, hypothesis in enumerate(self.hypotheses):
            hypothesis.origin = column
            if told[column]:
                hypothesis.unsent = []

    def open(self, g: Float[np.ndarray, "T D"] | None) -> None:
        """Takes the device's answer about the prompt, or that there is none: then it is run anew if its beginning is
        corrected, since it stays uncorrected as a whole."""
        self.phase = Phase.PROMPT
        if g is None and self.skipped:
            self.prompt_states, self.prompt_taps = [], []
            self.first = self.skipped = 0
            self._is_given_up = True
            return
        self.prompt_g, self.is_opened, self.first = g, True, self.skipped

    def extend(self, token: int, logprob: float, is_last: bool) -> None:
        """Adds a sampled token."""
        (hypothesis,) = self.hypotheses
        probability, wait = float(self.probability[0]), self._waited
        self.hypotheses = [hypothesis.extended(token, bool(self.asked[0]), probability, logprob, wait)]
        self._forget_answer()
        if is_last:
            self.phase = Phase.OVER

    def search(self, ranking: Ranking) -> None:
        """Replaces the hypotheses of a search by what one step made of them `[K]`."""
        before, asked = self.hypotheses, self.asked

        def extend(parents: Any, tokens: Any) -> list[Hypothesis]:
            return [
                before[parent].extended(token, bool(asked[parent]), float(self.probability[parent]))
                for parent, token in zip(parents.tolist(), tokens.tolist())
            ]

        ended = extend(ranking.ended_parents, ranking.ended_tokens)
        candidates = [*self.finished, *ended]
        self.finished = [candidates[index] for index in ranking.kept.tolist()]
        self.hypotheses = extend(ranking.parents, ranking.tokens)
        self.scores, self.finished_scores = ranking.scores, ranking.finished_scores
        self.seen = self.seen[ranking.parents]
        columns = np.arange(len(before))
        self.seen[columns, len(self.prompt) + (self.generated - 1) * len(before) + columns] = True
        self._forget_answer()
        if ranking.is_done:
            self.phase = Phase.OVER

    def _forget_answer(self) -> None:
        self.asked, self.g, self.token, self._waited = np.zeros_like(self.asked), None, None, 0.0

    def keep_newest(self, taps: Any) -> None:
        """Keeps the newest tokens' taps `[K,P,D]` until they are sent."""
        leaves, structure = jax.tree.flatten(taps)
        for hypothesis, *parts in zip(self.hypotheses, *leaves):
            newest = (self.position, jax.tree.unflatten(structure, parts))
            hypothesis.unsent = [*hypothesis.unsent, newest] if self.task.attends else [newest]

    def generation(self) -> Generation:
        """Returns the best text so far."""
        best = self.finished[0] or self.hypotheses[0]
        score = None if self.task.beams is None else float(self.finished_scores[0])
        probabilities = best.probabilities if self.task.routed else []
        return Generation(best.tokens, best.consulted, score, probabilities, best.logprobs, best.waits)
