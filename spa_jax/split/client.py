"""The device on a network: it opens the stream, answers the cloud's questions, and reconnects when the line breaks."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any

import grpc

from spa_jax.decoding.hypotheses import Generation
from spa_jax.errors import UserError
from spa_jax.split import refusals, wire
from spa_jax.split.channel import Traffic
from spa_jax.split.connection import Connection
from spa_jax.split.device import Device
from spa_jax.split.grpc_channel import MAX_BYTES_OPEN, METHOD, PREFIX_HEADER, SERVICE
from spa_jax.split.head import Head
from spa_jax.split.messages_pb2 import Cancel, FromCloud, FromDevice, Open, Progress, Reopen, Taps
from spa_jax.split.refusals import Busy, CloudGone, SessionLost, Unserved
from spa_jax.split.request import device_for, prefix_digest
from spa_jax.split.trust import (
    cause_of,
    check_opened,
    check_progress,
    merge_progress,
    most_bytes,
    most_questions,
    words_of,
)
from spa_jax.split.waiting import OnWait, Waiting
from spa_jax.weights.plugin import Plugin

OnProgress = Callable[[Progress], None]
"""Called with all that is generated so far."""
Metadata = list[tuple[str, str]]
Connect = Callable[["asyncio.Queue[bytes | None]", Metadata], Any]
"""(what is to be sent, metadata beside that of every stream) -> a call."""
MAX_QUEUED = 16
"""Questions that may wait for the side network; while there are as many, nothing is read from the cloud."""
MAX_COOKIES = 4
"""Cookies that a device keeps during a generation: one of each proxy between it and the cloud."""


@dataclasses.dataclass(frozen=True)
class RemoteResult:
    """The generations of a request, with their texts, the traffic that this device saw, the tokens that were chosen
    without the reply they waited for, and the prompts that were to be corrected and were not."""

    generations: list[Generation]
    texts: list[str]
    traffic: Traffic
    degraded: int
    uncorrected_prompts: int = 0
    lengths: Sequence[int] = ()
    """Tokens of each prompt."""


async def generate(
    connection: Connection,
    plugin: Plugin,
    request: Open,
    on_progress: OnProgress | None = None,
    head: Head | None = None,
    on_wait: OnWait | None = None,
    traffic: Traffic | None = None,
) -> RemoteResult:
    """Opens a generation at the cloud and answers its questions to the end; reconnects when the line breaks.

    Args:
        connection: to the cloud.
        plugin: of this device.
        request: made by `open_message` for that plugin.
        on_progress: called whenever there are new tokens.
        head: the LM head, for reply mode `token`.
        on_wait: called while nothing new comes.
        traffic: counts what passes, as it does; a new one by default.

    Raises:
        UserError: the request is too long, or the cloud refuses it.
        Unserved: the cloud is busy, does not know this device, has a certificate that is not to be trusted, or fails.
        WireError: it says what makes no sense.
        CloudGone: the cloud cannot be reached, the line broke and could not be restored within the connection's
            patience, or the cloud says nothing any more.
        SessionLost: the line was restored, but the session is gone.
    """
    if request.ByteSize() > MAX_BYTES_OPEN:
        raise UserError(
            f"the request has {request.ByteSize():,} bytes, and a cloud takes at most {MAX_BYTES_OPEN:,}: shorten the "
            "prompts, or ask for them in turn"
        )
    metadata = [(PREFIX_HEADER, prefix_digest(request))]
    if connection.token:
        metadata.append(("authorization", f"Bearer {connection.token}"))
    programs = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device")
    try:
        client = DeviceClient(plugin, request, on_progress, head, programs, connection, on_wait, traffic)
        async with connection.open(most_bytes(plugin.config, request)) as channel:
            method = channel.stream_stream(f"/{SERVICE}/{METHOD}")
            while True:
                reason = await client.run_stream(
                    lambda outbox, cookies: method(_drain(outbox), metadata=(*metadata, *cookies))
                )
                if client.progress.done:
                    return client.result()
                client.go_on(reason)
                await asyncio.sleep(0.2)
    finally:
        # One may be compiling, and other generations of this event loop go on meanwhile.
        programs.shutdown(wait=False, cancel_futures=True)


class DeviceClient:
    """A generation as its device sees it, over one stream after another.

    Whatever the cloud says, this ends: what brings something *new* (a token, a question) can come so often only as was
    asked for, and between two of these there is so much time, and so many messages, as `Connection` and `MAX_IDLE` say.

    Attributes:
        progress: all that is generated so far.
    """

    def __init__(
        self,
        plugin: Plugin,
        request: Open,
        on_progress: OnProgress | None,
        head: Head | None,
        programs: concurrent.futures.Executor,
        connection: Connection,
        on_wait: OnWait | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """`programs` runs one at a time: one that a lost stream has left behind ends before the next begins."""
        self._plugin, self._request, self._on_progress, self._head = plugin, request, on_progress, head
        self._connection, self._programs = connection, programs
        self._traffic = traffic or Traffic()
        self._traffic.prefill_bytes += request.ByteSize()
        self._device: Device | None = None
        self._lengths: list[int] = []
        self._session, self._answered_step = "", 0
        self._cookies = SimpleCookie()
        self._questions: asyncio.Queue[Taps] = asyncio.Queue(MAX_QUEUED)
        self.progress = Progress()
        # What has been new so far: the last question, positions of prompts, and tokens that the cloud told of.
        self._newest_step, self._prompt_positions, self._told_tokens = 0, 0, 0
        self._waiting = Waiting(connection, on_wait, self._gone)

    async def run_stream(self, connect: Connect) -> str:
        """Opens or reopens the session over a new stream, and answers until all is generated or the stream ends.

        Returns:
            Why it ended.

        Raises:
            UserError: the cloud refuses, does not know this device, has a certificate that is not to be trusted, or
                says what makes no sense.
            CloudGone: it says nothing any more.
            SessionLost: it has no such session.
        """
        self._waiting.begin_stream()
        self._questions = asyncio.Queue(MAX_QUEUED)
        outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        outbox.put_nowait(self._first_message().SerializeToString())
        call = connect(outbox, self._cookie_metadata())
        tasks = [
            asyncio.create_task(each) for each in (self._listen(call), self._answer(outbox), self._waiting.watch())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            return "the stream ended"
        except grpc.aio.AioRpcError as error:
            return self._reason(error)
        except BaseException:  # an interruption too: nobody waits for the answer any more
            outbox.put_nowait(FromDevice(cancel=Cancel()).SerializeToString())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.code(), 1.0)
            raise
        finally:
            for task in tasks:
                task.cancel()
            outbox.put_nowait(None)  # else gRPC leaves a task behind that reads it
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    def _first_message(self) -> FromDevice:
        """Makes the message that a stream begins with."""
        if self._session:
            return FromDevice(reopen=Reopen(session=self._session, step=self._answered_step))
        return FromDevice(open=self._request)

    def _keep_cookies(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Keeps the cookies of a stream's initial metadata, a few of them, and no nonsense."""
        for key, value in metadata:
            if key == "set-cookie" and len(self._cookies) < MAX_COOKIES:
                with contextlib.suppress(CookieError):
                    self._cookies.load(str(value))

    def _cookie_metadata(self) -> Metadata:
        """Makes the metadata by which a proxy finds the cloud that has the session; none if it has set no cookie."""
        pairs = "; ".join(f"{cookie.key}={cookie.coded_value}" for cookie in self._cookies.values())
        return [("cookie", pairs)] if pairs else []

    def _reason(self, error: grpc.aio.AioRpcError) -> str:
        """Says why a stream broke.

        Raises:
            Unserved: for a reason that another stream would not change.
            WireError: of a message that is too long.
        """
        address, reason = self._connection.address, words_of(error.details() or error.code().name)
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise Unserved(f"the cloud does not know this device: {reason}") from error
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in reason:
            raise wire.WireError(f"the cloud sends a message that is longer than any that was asked for ({reason})")
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and not self._session:
            raise Busy(f"the cloud refuses (overloaded): {reason}") from error
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise Unserved(
                f"the certificate of the cloud at {address} is not to be trusted ({reason}): it has expired, is for "
                "another name, or is signed by an authority that --ca does not name"
            ) from error
        if "WRONG_VERSION_NUMBER" in reason:
            raise Unserved(f"the cloud at {address} does not speak TLS") from error
        return cause_of(reason)

    def go_on(self, reason: str) -> None:
        """Goes on after a stream has ended.

        Raises:
            CloudGone: for too long streams have ended soon, and brought nothing new.
        """
        self._waiting.go_on_without(reason)

    def _gone(self, reason: str) -> CloudGone:
        """Makes the error of a cloud that is not there any more, or never was."""
        address = self._connection.address
        if not self._waiting.was_reached:
            hint = "" if self._connection.tls else " This device speaks to it without TLS."
            return CloudGone(
                f"cannot reach the cloud at {address} ({reason}): does it run, and at this address?{hint}", []
            )
        return CloudGone(
            f"the cloud at {address} is gone ({reason}); {self._num_tokens()} tokens had been generated",
            self.result().generations,
        )

    def _num_tokens(self) -> int:
        """Counts the tokens that are here."""
        return sum(len(generated.tokens) for generated in self.progress.generated)

    async def _listen(self, call: Any) -> None:
        """Handles the cloud's messages until all is generated."""
        self._keep_cookies(await call.initial_metadata())
        async for data in call:
            question = self.handle_message(data)
            if question is not None:
                self._waiting.is_behind = self._questions.full()
                await self._questions.put(question)
                self._waiting.is_behind = False
                self._waiting.hear()
            if self.progress.done:
                return

    def handle_message(self, data: bytes) -> Taps | None:
        """Takes a message of the cloud, and returns it if it is for the side network.

        Raises:
            SessionLost: the cloud has no such session.
            UserError: it is another refusal, of another protocol version or backbone, or makes no sense.
        """
        self._waiting.hear()
        message = wire.parse(FromCloud, data)
        kind = message.WhichOneof("message")
        is_new = message.HasField("progress") and self._take_progress(message.progress)
        if kind == "opened":
            check_opened(message.opened, self._request)
            self._waiting.leave_queue()
            is_new, self._session = not self._session, message.opened.session
            lengths = list(message.opened.lengths)
            self._device = self._device or device_for(self._plugin, self._request, lengths, self._head)
            self._lengths = self._lengths or lengths
        elif kind == "taps":
            is_new |= self._check_question(message.taps)
        elif kind == "working":
            told = min(message.working.tokens, len(self._request.prompts) * self._request.max_new_tokens)
            is_new, self._told_tokens = told > self._told_tokens, max(told, self._told_tokens)
        elif kind == "queued":
            self._waiting.go_on_in_queue(message.queued.place)
            is_new = True  # for no longer than the queue's own time
        elif kind == "refusal":
            refusal = message.refusal
            reason = f"the cloud refuses ({words_of(refusal.kind)}): {words_of(refusal.reason)}"
            if refusal.kind in refusals.LOST:
                raise SessionLost(reason, self.result().generations)
            raise refusals.BY_KIND.get(refusal.kind, Unserved)(reason)
        self._waiting.count(is_new, max(self._told_tokens, self._num_tokens()))
        return message.taps if kind == "taps" else None

    def _take_progress(self, new: Progress) -> bool:
        """Goes on to a new progress; says whether it has something new.

        Raises:
            WireError: it makes no sense.
        """
        check_progress(self.progress, new, self._request)
        before, self.progress = _size(self.progress), merge_progress(self.progress, new)
        if self._on_progress is not None:
            self._on_progress(self.progress)
        return _size(self.progress) > before or new.done

    def _check_question(self, taps: Taps) -> bool:
        """Says whether a question is new.

        Raises:
            WireError: it comes before the session is open, after a later one, or is one too many.
        """
        if self._device is None:
            raise wire.WireError("the cloud asks before it has opened a session")
        if taps.prompt and not taps.step:
            self._prompt_positions += len(taps.rows)
            return self._prompt_positions <= 4 * sum(self._lengths)  # a stream may break, and bring them again
        if not self._newest_step <= taps.step <= most_questions(self._request, sum(self._lengths)) or not taps.step:
            raise wire.WireError(f"the cloud asks a question of step {taps.step} after one of step {self._newest_step}")
        is_new, self._newest_step = taps.step > self._newest_step, taps.step
        return is_new

    async def _answer(self, outbox: "asyncio.Queue[bytes | None]") -> None:
        """Answers questions as long as the stream lasts, but none that is out of date.

        Raises:
            WireError: a question makes no sense.
        """
        questions, loop = self._questions, asyncio.get_running_loop()
        while True:
            taps = await questions.get()
            if not taps.prompt and not questions.empty():
                continue  # the cloud has gone on without an answer, and asks the next
            device, began = self._device, time.perf_counter()
            assert device is not None
            self._waiting.is_answering = True
            reply = await loop.run_in_executor(self._programs, device.receive, taps)
            self._waiting.is_answering = False
            self._traffic.device_seconds += time.perf_counter() - began
            if reply is None:
                self._traffic.prefill_bytes += taps.ByteSize()
                continue
            data = FromDevice(reply=reply).SerializeToString()
            self._answered_step = taps.step
            if taps.prompt:
                self._traffic.opening_exchanges += 1
                self._traffic.prefill_bytes += taps.ByteSize() + len(data)
            else:
                self._traffic.exchanges += 1
                self._traffic.bytes_down += taps.ByteSize()
                self._traffic.bytes_up += len(data)
            await asyncio.sleep(self._connection.delay)
            outbox.put_nowait(data)

    def result(self) -> RemoteResult:
        """Collects what has been generated so far."""
        generated = self.progress.generated
        return RemoteResult(
            [
                Generation(
                    list(g.tokens),
                    list(g.consulted),
                    g.score or None,
                    list(g.p_consult),
                    list(g.logprobs),
                    list(g.waits),
                )
                for g in generated
            ],
            ["".join(g.pieces) for g in generated],
            self._traffic,
            self.progress.degraded,
            self.progress.uncorrected_prompts,
            self._lengths,
        )


def _size(progress: Progress) -> int:
    """Counts tokens and pieces of text."""
    return sum(len(generated.tokens) + len(generated.pieces) for generated in progress.generated)


async def _drain(outbox: "asyncio.Queue[bytes | None]") -> AsyncIterator[bytes]:
    while (data := await outbox.get()) is not None:
        yield data
