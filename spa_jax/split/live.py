"""A session of the cloud that outlives its streams, and what the device at its end has yet to be told."""

import asyncio
from collections.abc import AsyncIterator

from spa_jax.split import metrics
from spa_jax.split.messages_pb2 import FromCloud, Reply, Taps
from spa_jax.split.session import Session


class Outbox:
    """What a stream has yet to send.

    A newer question or progress takes the place of an older one, so that a device that does not read costs no memory.
    """

    def __init__(self) -> None:
        self._waiting: dict[object, FromCloud] = {}
        self._changed = asyncio.Event()
        self._open = True

    def put(self, message: FromCloud) -> None:
        """Adds a message."""
        replaceable = message.HasField("progress") or (message.HasField("taps") and not message.taps.prompt)
        kind = message.WhichOneof("message") if replaceable else object()
        self._waiting.pop(kind, None)
        self._waiting[kind] = message
        self._changed.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._open = False
        self._changed.set()

    async def messages(self) -> AsyncIterator[FromCloud]:
        """Those that are put, until it is closed and empty."""
        while True:
            while self._waiting:
                yield self._waiting.pop(next(iter(self._waiting)))
            if not self._open:
                return
            self._changed.clear()
            await self._changed.wait()


class LiveSession:
    """A session, its task, and the stream that is attached to it now."""

    def __init__(self, session: Session, token: str, memory: int, began: float) -> None:
        self.session, self.token, self.memory, self.began = session, token, memory, began
        self.prompt: list[Taps] = session.prompt_messages()
        """Kept until the device has shown that it has them."""
        self.outbox: Outbox | None = None
        self.question: Taps | None = None
        self.answers: asyncio.Queue[Reply] = asyncio.Queue(maxsize=8)
        self.result: FromCloud | None = None
        """The last progress, when there is one."""
        self.under_way = True
        self.seconds_out = 0.0
        self.task: asyncio.Task[None] | None = None

    def waited(self, seconds: float) -> None:
        """Takes note of how long a question was out."""
        self.seconds_out += seconds
        metrics.SECONDS_PER_EXCHANGE.observe(seconds)

    def attach(self) -> Outbox:
        """A new outbox; the stream of the old one, if any, ends."""
        if self.outbox is not None:
            self.outbox.close()
        self.outbox = Outbox()
        return self.outbox

    def detach(self, outbox: Outbox) -> None:
        """The stream of this outbox is gone."""
        if self.outbox is outbox:
            self.outbox = None

    def say(self, message: FromCloud) -> None:
        """To the device that is attached, if one is."""
        if self.outbox is not None:
            self.outbox.put(message)
