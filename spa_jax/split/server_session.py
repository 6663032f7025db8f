"""A session on the server, which outlives its streams, and the messages that its device has yet to get."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from spa_jax.split import metrics
from spa_jax.split.admission import COST_OF_NEW, Applicant
from spa_jax.split.messages_pb2 import FromCloud, Generated, Progress, Reply, Taps
from spa_jax.split.session import Session

SIGN_EVERY = 5.0
"""Seconds without a message after which a device is told that the cloud works."""


class Outbox:
    """The messages that a stream has yet to send.

    A newer question or progress takes the place of an older one, so that a device that does not read costs no memory;
    where both wait, they go in one message.
    """

    def __init__(self) -> None:
        self._queued: dict[object, FromCloud] = {}
        self._changed = asyncio.Event()
        self._open = True

    def put_latest(self, message: FromCloud) -> None:
        """Adds a message; a question or progress takes the place of the one of its kind that still waits, and joins the
        one of the other kind."""
        place: object = object()
        if message.HasField("progress") or (message.HasField("taps") and not message.taps.prompt):
            place = "newest"
            waiting = self._queued.pop(place, FromCloud())
            for kind in ("progress", "taps"):
                if waiting.HasField(kind) and not message.HasField(kind):
                    getattr(message, kind).CopyFrom(getattr(waiting, kind))
        self._queued[place] = message
        self._changed.set()

    def close(self) -> None:
        """Ends `messages` once it is empty."""
        self._open = False
        self._changed.set()

    async def messages(self) -> AsyncIterator[FromCloud | None]:
        """Yields messages as they are added, and None whenever a sign of life is due, until the outbox is closed and
        empty."""
        while True:
            while self._queued:
                yield self._queued.pop(next(iter(self._queued)))
            if not self._open:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SIGN_EVERY):
                    await self._changed.wait()
            if not self._changed.is_set():
                yield None


class ServerSession:
    """A session, its task, and the stream that is attached to it now.

    Attributes:
        generation: what it generates.
        token: of the device that opened it.
        applicant: as which it was admitted.
        opened_at: seconds on `time.perf_counter`'s clock.
        moved: set whenever the engine may have done something for it.
        failure: what made the engine forget it.
        prompt_messages: messages with the prompt's taps, kept until the device has shown that it has them.
        prompt_step: the last question before these messages.
        outbox: of the attached stream; None where no device is attached.
        detached_at: when the last one was lost, on `time.monotonic`'s clock.
        question: the one that has no answer yet, if any.
        answer: the device's reply to it, once that has come.
        is_done: whether all is generated.
        is_running: False when it is over, and takes no memory any more.
        seconds_waited: for answers, all questions together.
        task: runs the session.
    """

    def __init__(self, generation: Session, token: str, applicant: Applicant, opened_at: float) -> None:
        """Takes note of a generation."""
        self.generation, self.token, self.applicant, self.opened_at = generation, token, applicant, opened_at
        self.moved = asyncio.Event()
        self.failure: Exception | None = None
        self._num_counted = 0
        self._newest_at: float | None = None
        self.prompt_messages: list[FromCloud] = []
        self.prompt_step = 0
        self.outbox: Outbox | None = None
        self.detached_at = 0.0
        self.question: Taps | None = None
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.is_done = False
        self.is_running = True
        self.seconds_waited = 0.0
        self.task: asyncio.Task[None] | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(len(each.tokens) for each in self.generation.result())

    def count_new(self) -> bool:
        """Counts the tokens that came since it was last called; says whether there are any."""
        new = self.num_tokens - self._num_counted
        if new <= 0:  # a search may now think less of a longer text
            return False
        now = time.perf_counter()
        self._num_counted += new
        metrics.TOKENS.inc(new)
        if self._newest_at is None:
            metrics.SECONDS_TO_FIRST_TOKEN.observe(now - self.opened_at)
        else:
            metrics.SECONDS_BETWEEN_TOKENS.observe(now - self._newest_at)
        self._newest_at = now
        return True

    def unused_cost(self) -> float:
        """Computes what it has not used of the cost that it was admitted with."""
        plan = self.generation.plan
        return COST_OF_NEW * (len(plan.prompts) * plan.task.limit - self.num_tokens)

    def send_progress(self) -> None:
        """Lets the attached device know of what is new."""
        self.send(FromCloud(progress=Progress(done=self.is_done)))

    def progress(self, num_sent: list[tuple[int, int]]) -> Progress:
        """Makes the message with what is generated beyond the tokens and pieces of each prompt that a stream has sent,
        and counts it as sent."""
        parts = []
        for prompt, (each, text) in enumerate(zip(self.generation.result(), self.generation.texts)):
            tokens, pieces = num_sent[prompt]
            num_sent[prompt] = len(each.tokens), len(text.pieces)
            parts.append(
                Generated(
                    tokens=each.tokens[tokens:],
                    consulted=each.consulted[tokens:],
                    score=each.score or 0.0,
                    pieces=text.pieces[pieces:],
                    begin=tokens,
                    logprobs=each.logprobs[tokens:] if self.generation.plan.task.scored else (),
                    p_consult=each.p_consult[tokens:],
                    waits=each.waits[tokens:],
                    stopped=text.is_stopped,
                )
            )
        degraded, uncorrected = self.generation.degraded, self.generation.uncorrected_prompts
        return Progress(generated=parts, done=self.is_done, degraded=degraded, uncorrected_prompts=uncorrected)

    def send_prompt_messages(self, asked: int) -> None:
        """Sends what the generation has for the device to keep, after its question `asked`; mostly nothing."""
        messages = [FromCloud(taps=part) for part in self.generation.prompt_messages()]
        if messages:
            self.prompt_messages, self.prompt_step = messages, asked
        for message in messages:
            self.send(message)

    def ask(self, question: Taps) -> None:
        """Sends a question."""
        self.question, self.answer = question, asyncio.get_running_loop().create_future()
        self.send(FromCloud(taps=question))

    def take(self, reply: Reply) -> bool:
        """Takes a reply to the question that is open, and no other: so much and no more is kept of what a device says,
        however much it says."""
        if self.question is None or reply.step != self.question.step or self.answer.done():
            return False
        self.answer.set_result(reply)
        return True

    def cancel(self) -> None:
        """Ends it."""
        if self.task is not None:
            self.task.cancel()

    def record_wait(self, seconds: float) -> None:
        """Adds the time that a question waited for its answer."""
        self.seconds_waited += seconds
        metrics.SECONDS_PER_EXCHANGE.observe(seconds)

    def attach(self) -> Outbox:
        """Makes an outbox for a new stream, and ends the stream of the old one, if any."""
        if self.outbox is not None:
            self.outbox.close()
        self.outbox = Outbox()
        return self.outbox

    def detach(self, outbox: Outbox) -> None:
        """Takes note that the stream of this outbox is gone."""
        if self.outbox is outbox:
            self.outbox, self.detached_at = None, time.monotonic()

    def send(self, message: FromCloud) -> None:
        """Sends a message to the attached device, if there is one."""
        if self.outbox is not None:
            self.outbox.put_latest(message)

    def send_current(self) -> None:
        """Sends a device that has just attached the prompt's taps, and the open question or the result."""
        for message in self.prompt_messages:
            self.send(message)
        if self.is_done:
            self.send_progress()
        elif self.question is not None:
            self.send(FromCloud(taps=self.question))
