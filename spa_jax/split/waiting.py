"""How long a device waits for its cloud, and what its user is told meanwhile."""

import asyncio
import logging
import time
from collections.abc import Callable

from spa_jax.split import wire
from spa_jax.split.connection import Connection
from spa_jax.split.refusals import Busy, CloudGone

log = logging.getLogger(__name__)
OnWait = Callable[[str], None]
"""Called every `TELL_EVERY` seconds while nothing new comes, with what is waited for."""
MAX_IDLE = 1000
"""Messages in a row that may bring nothing new."""
TELL_EVERY = 1.0
"""Seconds after which a user is told what is waited for, and told again."""
MAX_SIGNS = 10
"""For how many times `Connection.silence` a cloud is believed that it works, while it brings nothing new."""


class Waiting:
    """A device's wait for its cloud: what it has heard, and when.

    Attributes:
        was_reached: whether the cloud has ever said anything.
        is_behind: whether messages lie unread because the device has not answered those before them.
        is_answering: whether the device works on an answer.
    """

    def __init__(self, connection: Connection, on_wait: OnWait | None, gone: Callable[[str], CloudGone]) -> None:
        """Begins to wait; `gone` makes the error of a cloud that cannot be waited for any more, of the reason."""
        self._connection, self._on_wait, self._gone = connection, on_wait, gone
        self.was_reached = self.is_behind = self.is_answering = False
        # On time.monotonic's clock; None where it has not been.
        self._began_at = self._new_at = self._heard_at = time.monotonic()
        self._queued_at: float | None = None
        self._is_in_queue = False
        self._lost_at: float | None = None
        self._num_idle = self._num_tokens = 0

    def begin_stream(self) -> None:
        """Begins to wait for what a new stream brings."""
        self._began_at = self._heard_at = time.monotonic()
        self.is_behind = self.is_answering = False

    def hear(self) -> None:
        """Takes note that the cloud says something, or could have."""
        self._heard_at, self.was_reached = time.monotonic(), True

    def count(self, is_new: bool, num_tokens: int) -> None:
        """Counts a message that was heard, by whether it brought anything new; so many tokens are generated now.

        Raises:
            WireError: too many in a row brought nothing.
        """
        self._num_tokens = num_tokens
        if is_new:
            self._new_at, self._num_idle, self._lost_at = self._heard_at, 0, None
        self._num_idle += 1
        if self._num_idle > MAX_IDLE:
            raise wire.WireError(f"the cloud sends one message after another, and {MAX_IDLE} of them bring nothing new")

    def go_on_without(self, reason: str) -> None:
        """Goes on after a stream has ended.

        Raises:
            CloudGone: for too long streams have ended soon, and brought nothing new.
        """
        now, patience = time.monotonic(), self._connection.patience
        has_lasted = self._heard_at > self._began_at and now - self._began_at > patience
        if self._lost_at is None or has_lasted:
            self._lost_at = now
        if now - self._lost_at > patience:
            raise self._gone(reason)
        self._tell(f"connecting to the cloud at {self._connection.address}: {now - self._lost_at:.0f} s")

    def go_on_in_queue(self, place: int) -> None:
        """Goes on at a place of the cloud's queue.

        Raises:
            Busy: the user does not want to wait so long.
        """
        if self._queued_at is None:
            self._queued_at = self._heard_at
            log.warning("the cloud is busy: this is number %d in its queue", place)
        waited = self._heard_at - self._queued_at
        if waited >= self._connection.queue_seconds:
            raise Busy(f"the cloud is busy: after {waited:.0f} s this is still number {place} in its queue")
        self._is_in_queue = True
        self._tell(f"number {place} in the cloud's queue: {waited:.0f} s")

    def leave_queue(self) -> None:
        """Takes note that the generation begins."""
        self._is_in_queue = False

    async def watch(self) -> None:
        """Watches the time while a stream lasts.

        Raises:
            CloudGone: the cloud says nothing, or nothing new, for too long.
        """
        silence, now = self._connection.silence, time.monotonic()
        pause = min(TELL_EVERY, silence / 4)
        while True:
            before = now
            await asyncio.sleep(pause)
            now = time.monotonic()
            if now - before > pause + 1:  # this process stood still, as after Ctrl-Z, and not the cloud
                self._heard_at += now - before
                self._new_at += now - before
            if self.is_behind:
                continue
            if now - self._heard_at > silence:
                raise self._gone(f"it has said nothing for {now - self._heard_at:.0f} s")
            waited = now - self._new_at
            if waited > MAX_SIGNS * silence:
                raise self._gone(f"it says that it works, and has brought nothing new for {waited:.0f} s")
            if waited >= TELL_EVERY and not self._is_in_queue:
                self._tell(f"{self._awaited()}: {waited:.0f} s")

    def _awaited(self) -> str:
        """Describes what is waited for."""
        if self.is_answering:
            return "this device works"
        if self._heard_at <= self._began_at:
            return f"connecting to the cloud at {self._connection.address}"
        return (
            f"the cloud works, {self._num_tokens} tokens so far"
            if self._num_tokens
            else "the cloud works, no token yet"
        )

    def _tell(self, what: str) -> None:
        if self._on_wait is not None:
            self._on_wait(what)
