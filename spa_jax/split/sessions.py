"""The sessions of a cloud on one engine, each a task of its own that never waits for a device without a deadline.

A device attaches to its session with a stream; when the stream goes, the session goes on: its questions are not
answered in time, and its tokens are chosen from f alone, until the device comes back or has been gone for too long."""

import asyncio
import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from spa_jax.engine.engine import Engine
from spa_jax.split import metrics, wire
from spa_jax.split.admission import Admission, Limits
from spa_jax.split.messages_pb2 import FromCloud, Refusal, Taps
from spa_jax.split.server_session import Outbox, ServerSession

log = logging.getLogger(__name__)
Result = TypeVar("Result")
STOPPING = "it stops, and does not end this generation: generate again"


class Sessions:
    """Sessions by their names, with those that are over as long as their devices may come back for the result."""

    def __init__(self, engine: Engine, admission: Admission, limits: Limits) -> None:
        """Begins to turn the engine."""
        self._engine, self._admission, self._limits = engine, admission, limits
        self._by_name: dict[str, ServerSession] = {}
        self._programs = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="programs")
        self._has_work, self._has_answer = asyncio.Event(), asyncio.Event()
        self._turning = asyncio.create_task(self._turn_engine())

    async def run_program(self, program: Callable[[], Result]) -> Result:
        """Runs what uses the engine, in the one thread that does."""
        return await asyncio.get_running_loop().run_in_executor(self._programs, program)

    def find(self, name: str, token: str) -> ServerSession | None:
        """Finds a session of the device with this token."""
        found = self._by_name.get(name)
        return found if found is not None and found.token == token else None

    def start(self, session: ServerSession) -> None:
        """Begins to run a session."""
        self._by_name[session.generation.id] = session
        metrics.SESSIONS.inc()
        session.task = asyncio.create_task(self._run_session(session))

    def detach(self, session: ServerSession, outbox: Outbox) -> None:
        """Takes note that a stream is gone; the session ends if no other comes for a while."""
        session.detach(outbox)
        asyncio.get_running_loop().call_later(self._limits.abandoned, self._end_abandoned, session.generation.id)

    def end_unknown(self, knows: Callable[[str], bool]) -> None:
        """Ends the sessions of tokens that are not known any more."""
        for session in list(self._by_name.values()):
            if not knows(session.token):
                log.info("session %s ends: its token was taken away", session.generation.id)
                session.cancel()

    async def drain(self, seconds: float) -> None:
        """Waits so long for those under way, and ends those that are left."""
        latest = time.monotonic() + seconds
        while (running := [each for each in self._by_name.values() if each.is_running]) and time.monotonic() < latest:
            await asyncio.sleep(0.05)
        for session in running:
            log.info("session %s is cut: this cloud stops", session.generation.id)
            session.send(FromCloud(refusal=Refusal(kind="stopping", reason=STOPPING, version=wire.VERSION)))
            session.cancel()

    async def close(self) -> None:
        """Stops all of them; nobody may start another one."""
        tasks = [self._turning, *(session.task for session in self._by_name.values() if session.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._programs.shutdown(wait=True, cancel_futures=True)

    async def _run_session(self, session: ServerSession) -> None:
        """Runs a session to its end, whoever is attached, and keeps its result for a while."""
        try:
            await self._generate(session)
            self._release(session)
            await asyncio.sleep(self._limits.linger)
        except asyncio.CancelledError:
            if session.is_running:
                log.info("session %s cancelled", session.generation.id)
        except Exception as error:
            log.exception("session %s failed", session.generation.id)
            session.send(FromCloud(refusal=Refusal(kind="failed", reason=type(error).__name__, version=wire.VERSION)))
        finally:
            self._release(session)
            self._by_name.pop(session.generation.id, None)
            if session.outbox is not None:
                session.outbox.close()

    def _end_abandoned(self, name: str) -> None:
        """Ends a session that nobody has been attached to for a while."""
        session = self._by_name.get(name)
        if session is None or session.outbox is not None or not session.is_running:
            return
        if time.monotonic() - session.detached_at >= self._limits.abandoned:
            log.info("session %s abandoned", name)
            session.cancel()

    async def _turn_engine(self) -> None:
        """Turns the engine whenever it has something to do."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            try:
                while True:
                    await self._await_answers()
                    if not await self.run_program(self._engine.go_on):
                        break
                    self._wake_sessions()
            except Exception as error:
                log.exception("the engine failed, and with it %d sessions", len(self._by_name))
                await self.run_program(self._engine.reset)
                self._wake_sessions(error)

    def _wake_sessions(self, failure: Exception | None = None) -> None:
        """Lets every session look at what the engine did."""
        for session in self._by_name.values():
            session.failure = session.failure or failure
            session.moved.set()

    async def _await_answers(self) -> None:
        """Waits for answers as long as the engine holds those that are ready for them."""
        while (seconds := self._engine.hold()) > 0:
            self._has_answer.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._has_answer.wait()

    async def _settle(self, session: ServerSession) -> None:
        """Lets the engine go on with a session until it waits for its device or is over, and tells of its tokens."""
        self._has_work.set()
        while True:
            if session.failure is not None:
                raise session.failure
            is_settled = session.generation.is_settled
            session.generation.read()
            if session.count_new() and session.generation.plan.task.beams is None:
                session.send_progress()
            if is_settled or session.generation.is_over:
                return
            session.moved.clear()
            await session.moved.wait()

    async def _generate(self, session: ServerSession) -> None:
        """Asks and goes on until all is generated."""
        generation = session.generation
        previous: Taps | None = None
        while True:
            await self._settle(session)
            session.send_prompt_messages(previous.step if previous else 0)
            question = generation.next_question()
            if question is None:
                break
            session.ask(question)
            metrics.EXCHANGES.inc()
            may_compile = previous is None or previous.prompt != question.prompt
            await self._await_reply(session, may_compile)
            session.question, previous = None, question
            self._has_answer.set()
        generation.read(is_over=True)
        session.is_done = True
        session.send_progress()
        metrics.DEGRADED.inc(generation.degraded)
        metrics.UNCORRECTED_PROMPTS.inc(generation.uncorrected_prompts)
        metrics.SECONDS_PER_TOKEN.observe((time.perf_counter() - session.opened_at) / max(session.num_tokens, 1))
        log.info(
            "session %s: %d tokens, %d degraded, %.4f s of questions being out",
            generation.id,
            session.num_tokens,
            generation.degraded,
            session.seconds_waited,
        )

    async def _await_reply(self, session: ServerSession, may_compile: bool) -> None:
        """Waits for a reply until the deadline, the longer one where the device may have to compile a program first,
        then goes on with it or, if it is not valid, without one."""
        asked_at, seconds = time.monotonic(), self._limits.deadline
        if may_compile:
            seconds = max(seconds, self._limits.first_deadline)
        try:
            async with asyncio.timeout(seconds):  # `wait_for` loses a cancellation that comes with the answer
                reply = await session.answer
        except TimeoutError:
            metrics.MISSED.inc()
            reply = None
        session.record_wait(time.monotonic() - asked_at)
        try:
            session.generation.apply_reply(reply)
        except wire.WireError as error:
            metrics.DROPPED.inc()
            log.warning("session %s: %s", session.generation.id, error)
            session.generation.apply_reply(None)
        else:
            if reply is not None:
                session.prompt_messages = []

    def _release(self, session: ServerSession) -> None:
        """Frees a session's memory; the results of at most `Limits.sessions` that are over are kept."""
        if not session.is_running:
            return
        session.is_running = False
        metrics.SESSIONS.dec()
        session.generation.free()
        self._admission.leave(session.applicant, session.unused_cost())
        self._has_work.set()
        finished = [other for other in self._by_name.values() if not other.is_running]
        for other in finished[: -self._limits.sessions]:
            other.cancel()
