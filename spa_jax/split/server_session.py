"""A session on the server, which outlives its streams, and the messages that its device has yet to get."""

import asyncio
from collections.abc import AsyncIterator

from spa_jax.split import metrics
from spa_jax.split.messages_pb2 import FromCloud, Reply, Taps
from spa_jax.split.session import Session


class Outbox:
    """The messages that a stream has yet to send.

    A newer question or progress takes the place of an older one, so that a device that does not read costs no memory.
    """

    def __init__(self) -> None:
        self._queued: dict[object, FromCloud] = {}
        self._changed = asyncio.Event()
        self._open = True

    def put_latest(self, message: FromCloud) -> None:
        """Adds a message; a question or progress takes the place of the one of its kind that still waits."""
        replaceable = message.HasField("progress") or (message.HasField("taps") and not message.taps.prompt)
        kind = message.WhichOneof("message") if replaceable else object()
        self._queued.pop(kind, None)
        self._queued[kind] = message
        self._changed.set()

    def close(self) -> None:
        """Ends `messages` once it is empty."""
        self._open = False
        self._changed.set()

    async def messages(self) -> AsyncIterator[FromCloud]:
        """Yields messages as they are added, until the outbox is closed and empty."""
        while True:
            while self._queued:
                yield self._queued.pop(next(iter(self._queued)))
            if not self._open:
                return
            self._changed.clear()
            await self._changed.wait()


class ServerSession:
    """A session, its task, and the stream that is attached to it now.

    Attributes:
        generation: what it generates.
        token: of the device that opened it.
        memory: bytes that it takes.
        opened_at: seconds on `time.perf_counter`'s clock.
        prompt_messages: messages with the prompt's taps, kept until the device has shown that it has them.
        prompt_step: the last question before these messages.
        outbox: of the attached stream; None where no device is attached.
        question: the one that has no answer yet, if any.
        replies: of the device, not looked at yet.
        final_progress: the last message, when all is generated.
        is_running: False when it is over, and takes no memory any more.
        seconds_waited: for answers, all questions together.
        task: runs the session.
    """

    def __init__(self, generation: Session, token: str, memory: int, opened_at: float) -> None:
        self.generation, self.token, self.memory, self.opened_at = generation, token, memory, opened_at
        self.prompt_messages: list[Taps] = generation.prompt_messages()
        self.prompt_step = 0
        self.outbox: Outbox | None = None
        self.question: Taps | None = None
        self.replies: asyncio.Queue[Reply] = asyncio.Queue(maxsize=8)
        self.final_progress: FromCloud | None = None
        self.is_running = True
        self.seconds_waited = 0.0
        self.task: asyncio.Task[None] | None = None

    def send_prompt_messages(self, asked: int) -> None:
        """Sends what the generation has for the device to keep, after its question `asked`; mostly nothing."""
        messages = self.generation.prompt_messages()
        if messages:
            self.prompt_messages, self.prompt_step = messages, asked
        for part in messages:
            self.send(FromCloud(taps=part))

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
            self.outbox = None

    def send(self, message: FromCloud) -> None:
        """Sends a message to the attached device, if there is one."""
        if self.outbox is not None:
            self.outbox.put_latest(message)

    def send_current(self) -> None:
        """Sends a device that has just attached the prompt's taps, and the open question or the result."""
        for part in self.prompt_messages:
            self.send(FromCloud(taps=part))
        if self.final_progress is not None:
            self.send(self.final_progress)
        elif self.question is not None:
            self.send(FromCloud(taps=self.question))
