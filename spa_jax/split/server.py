"""The cloud on a network: sessions that outlive their connections, and never wait for a device without a deadline.

Each session is a task of its own. A device attaches to it with a stream; when the stream goes, the session goes on:
its questions are not answered in time, and its tokens are chosen from f alone, until the device comes back with the
session's id. Programs run one at a time in one thread, a step of one session after a step of another.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from spa_jax.errors import UserError
from spa_jax.split import metrics, wire
from spa_jax.split.grpc_channel import CLOUD_OPTIONS, METHOD, SERVICE, ServerSecurity
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Generated, Opened, Progress, Refusal, Taps
from spa_jax.split.server_session import ServerSession
from spa_jax.split.session import Cloud, Session

log = logging.getLogger(__name__)
Result = TypeVar("Result")
MAX_REASON_LENGTH = 1000
"""Most characters of a refusal, which may repeat what the device asked for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that devices may use of a cloud.

    Attributes:
        sessions: running generations of all devices.
        sessions_per_token: running generations of one device token.
        memory: bytes of the caches of all running sessions.
        deadline: seconds a device has for an answer.
        first_deadline: seconds for its first answer about a prompt and its first about a new token, if that is longer:
            a device compiles its programs then.
        linger: seconds a finished session is kept for a device that lost its connection; at most `sessions` are.
        open_seconds: seconds a stream may take to send its first message.
    """

    sessions: int = 64
    sessions_per_token: int = 8
    memory: int = 4 * 2**30
    deadline: float = 1.0
    first_deadline: float = 10.0
    linger: float = 30.0
    open_seconds: float = 10.0

    def check(self) -> "Limits":
        """Refuses values out of range, and returns itself.

        Raises:
            UserError: a limit is not above 0 (`linger` and `first_deadline`: below 0); the message names it.
        """
        for name, value in dataclasses.asdict(self).items():
            if not (value > 0 or (value == 0 and name in ("linger", "first_deadline"))):
                raise UserError(f"{name} is {value}, but must be above 0")
        return self


class Server:
    """A cloud that serves sessions over gRPC."""

    def __init__(self, cloud: Cloud, limits: Limits, tokens: frozenset[str] | None) -> None:
        """Serves the devices that have one of these tokens; all devices if there is None."""
        self._cloud, self._limits, self._tokens = cloud, limits, tokens
        self._sessions: dict[str, ServerSession] = {}
        self._opening: list[tuple[str, int]] = []  # token and memory of the sessions whose prompts are running
        self._programs = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="programs")

    async def generate(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Serves the one method: a stream of `FromDevice`, answered by one of `FromCloud`, both as bytes."""
        metadata = dict(context.invocation_metadata() or ())
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if not self._is_known(token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this device token is unknown to the cloud")
        try:
            first = await asyncio.wait_for(anext(requests), self._limits.open_seconds)
            metrics.BYTES_UP.inc(len(first))
            session = await self._find_or_open(wire.parse(FromDevice, first), token)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream did not say what it wants")
        except Refused as error:
            yield _refusal(error.kind, str(error))
            return
        except UserError as error:
            yield _refusal("refused", str(error))
            return
        except asyncio.CancelledError:  # gRPC would log a traceback where nothing is wrong
            log.info("a stream ended before its session was open")
            return
        outbox, lengths = session.attach(), session.generation.lengths
        outbox.put_latest(
            FromCloud(opened=Opened(session=session.generation.id, version=wire.VERSION, lengths=lengths))
        )
        session.send_current()
        reader, num_sent = asyncio.create_task(self._read(session, requests)), [(0, 0)] * len(lengths)
        try:
            async for message in outbox.messages():
                data = _without_sent(message, num_sent).SerializeToString()
                metrics.BYTES_DOWN.inc(len(data))
                yield data
                if message.HasField("refusal") or (message.HasField("progress") and message.progress.done):
                    break
        finally:
            reader.cancel()
            session.detach(outbox)

    async def close(self) -> None:
        """Stops all sessions; no stream may be left that could open another one."""
        tasks = [session.task for session in self._sessions.values() if session.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._programs.shutdown(wait=True, cancel_futures=True)

    async def _find_or_open(self, message: FromDevice, token: str) -> ServerSession:
        """Finds the session that a stream's first message reopens, or starts the one that it opens.

        Raises:
            Refused: there is no such session, or no room for another one.
            UserError: the message makes no sense.
        """
        kind = message.WhichOneof("message")
        if kind == "reopen":
            found = self._sessions.get(message.reopen.session)
            if found is None or found.token != token:
                raise Refused("unknown-session", "the cloud has no such session any more: generate again")
            if message.reopen.step > found.prompt_step:
                found.prompt_messages = []
            return found
        if kind != "open":
            raise UserError("the first message must open a session")
        plan = await self._run_program(lambda: self._cloud.plan(message.open))
        opened_at = time.perf_counter()
        self._check_capacity(plan.bytes, token)
        self._opening.append((token, plan.bytes))
        try:
            session = await self._run_program(
                lambda: ServerSession(self._cloud.begin(plan), token, plan.bytes, opened_at)
            )
        finally:
            self._opening.remove((token, plan.bytes))
        self._sessions[session.generation.id] = session
        metrics.SESSIONS.inc()
        session.task = asyncio.create_task(self._run_session(session))
        log.info("session %s opened: %d prompts", session.generation.id, len(message.open.prompts))
        return session

    def _is_known(self, token: str) -> bool:
        """Compares with every token to the end, so that the time it takes tells nothing about them."""
        given = token.encode(errors="replace")
        return self._tokens is None or sum(hmac.compare_digest(given, known.encode()) for known in self._tokens) > 0

    def _check_capacity(self, memory: int, token: str) -> None:
        """Checks that there is room for another session.

        Raises:
            UserError: no session may take so much memory.
            Refused: the running sessions leave no room for it.
        """
        limits = self._limits
        used = [*self._opening, *((other.token, other.memory) for other in self._sessions.values() if other.is_running)]
        of_token = sum(owner == token for owner, _ in used)
        if memory > limits.memory:
            raise UserError(
                f"this generation takes {memory / 2**20:.0f} MiB, and the cloud has {limits.memory / 2**20:.0f}: "
                "ask for fewer new tokens, prompts or beams"
            )
        if len(used) >= limits.sessions:
            raise Refused("overloaded", "the cloud has as many sessions as it can take: try again later")
        if self._tokens is not None and of_token >= limits.sessions_per_token:
            raise Refused("overloaded", f"this device token has {of_token} sessions under way: try again later")
        if memory + sum(size for _, size in used) > limits.memory:
            raise Refused("overloaded", "the cloud's memory is taken by other sessions: try again later")

    async def _read(self, session: ServerSession, requests: AsyncIterator[bytes]) -> None:
        """Queues the device's replies until its stream ends."""
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            async for data in requests:
                metrics.BYTES_UP.inc(len(data))
                try:
                    message = wire.parse(FromDevice, data)
                except wire.WireError:
                    metrics.DROPPED.inc()
                    continue
                kind = message.WhichOneof("message")
                if kind == "cancel" and session.task is not None:
                    session.task.cancel()
                elif kind == "reply" and not session.replies.full():
                    session.replies.put_nowait(message.reply)
                else:
                    metrics.DROPPED.inc()

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
            self._sessions.pop(session.generation.id, None)
            if session.outbox is not None:
                session.outbox.close()

    async def _generate(self, session: ServerSession) -> None:
        """Asks and advances until all is generated."""
        generation, is_first = session.generation, True

        def observe_first_token() -> None:
            nonlocal is_first
            if is_first:
                metrics.SECONDS_TO_FIRST_TOKEN.observe(time.perf_counter() - session.opened_at)
            is_first = False

        previous: Taps | None = None
        while (question := await self._run_program(generation.next_question)) is not None:
            session.question = question
            session.send(FromCloud(taps=question))
            metrics.EXCHANGES.inc()
            may_compile = previous is None or previous.prompt != question.prompt
            await self._await_reply(session, question.step, may_compile)
            session.question, previous = None, question
            session.send_prompt_messages(question.step)
            if question.prompt:
                continue
            observe_first_token()
            if generation.config.beams is None:
                session.send(await self._run_program(lambda: self._progress(generation, done=False)))
        session.final_progress = await self._run_program(lambda: self._progress(generation, done=True))
        observe_first_token()
        session.send(session.final_progress)
        count = sum(len(generated.tokens) for generated in session.final_progress.progress.generated)
        metrics.TOKENS.inc(count)
        metrics.DEGRADED.inc(generation.degraded)
        metrics.UNCORRECTED_PROMPTS.inc(generation.uncorrected_prompts)
        metrics.SECONDS_PER_TOKEN.observe((time.perf_counter() - session.opened_at) / max(count, 1))
        log.info(
            "session %s: %d tokens, %d degraded, %.4f s of questions being out",
            generation.id,
            count,
            generation.degraded,
            session.seconds_waited,
        )

    def _release(self, session: ServerSession) -> None:
        """Frees a session's memory; the results of at most `Limits.sessions` that are over are kept."""
        if not session.is_running:
            return
        session.is_running = False
        metrics.SESSIONS.dec()
        self._programs.submit(session.generation.free)  # not here: one of its programs may be running
        finished = [other for other in self._sessions.values() if not other.is_running]
        for other in finished[: -self._limits.sessions]:
            if other.task is not None:
                other.task.cancel()

    async def _await_reply(self, session: ServerSession, step: int, may_compile: bool) -> None:
        """Waits for a valid reply until the deadline, the longer one where the device may have to compile a program
        first, then goes on with it or without one."""
        asked_at = time.monotonic()
        deadline = asked_at + self._limits.deadline
        if may_compile:
            deadline = max(deadline, asked_at + self._limits.first_deadline)
        while True:
            try:
                reply = await asyncio.wait_for(session.replies.get(), max(deadline - time.monotonic(), 0))
            except TimeoutError:
                session.record_wait(time.monotonic() - asked_at)
                break
            if reply.step != step:
                metrics.DROPPED.inc()
                continue
            session.record_wait(time.monotonic() - asked_at)
            try:
                await self._run_program(functools.partial(session.generation.apply_reply, reply))
                session.prompt_messages = []
                return
            except wire.WireError as error:
                metrics.DROPPED.inc()
                log.warning("session %s: %s", session.generation.id, error)
                break
        await self._run_program(lambda: session.generation.apply_reply(None))

    def _progress(self, generation: Session, done: bool) -> FromCloud:
        """Makes the message with all tokens so far."""
        parts = [
            Generated(
                tokens=g.tokens,
                consulted=g.consulted,
                score=g.score or 0.0,
                pieces=self._cloud.token_texts(g, ended=done),
            )
            for g in generation.result()
        ]
        return FromCloud(
            progress=Progress(
                generated=parts,
                done=done,
                degraded=generation.degraded,
                uncorrected_prompts=generation.uncorrected_prompts,
            )
        )

    async def _run_program(self, program: Callable[[], Result]) -> Result:
        """Runs a program of the cloud in their one thread."""
        return await asyncio.get_running_loop().run_in_executor(self._programs, program)


@contextlib.asynccontextmanager
async def serving(
    cloud: Cloud, address: str, limits: Limits, security: ServerSecurity
) -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    """Starts a server with gRPC's health service beside ours, gives it and its port, and ends its sessions on leaving.

    Raises:
        UserError: certificates or tokens that cannot be used, or an address that is taken.
    """
    service = Server(cloud, limits.check(), security.device_tokens())
    server = grpc.aio.server(options=CLOUD_OPTIONS, maximum_concurrent_rpcs=4 * limits.sessions)
    handler = grpc.stream_stream_rpc_method_handler(service.generate)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    credentials = security.credentials()
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise UserError(f"cannot listen on {address}: {error}") from error
    await server.start()
    try:
        yield server, port
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(grace=1)
        await service.close()


class Refused(UserError):
    """A refusal of another kind than a request that makes no sense."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _without_sent(message: FromCloud, num_sent: list[tuple[int, int]]) -> FromCloud:
    """Drops from a progress the tokens and pieces of each prompt that its stream has sent before, `num_sent` of each;
    counts the others."""
    if not message.HasField("progress"):
        return message
    trimmed = FromCloud()
    trimmed.CopyFrom(message)
    for prompt, generated in enumerate(trimmed.progress.generated):
        (tokens, pieces), num_sent[prompt] = num_sent[prompt], (len(generated.tokens), len(generated.pieces))
        generated.begin = tokens
        for field, count in ((generated.tokens, tokens), (generated.consulted, tokens), (generated.pieces, pieces)):
            del field[:count]
    return trimmed


def _refusal(kind: str, reason: str) -> bytes:
    reason = reason[:MAX_REASON_LENGTH]
    log.info("refused: %s", reason)
    return FromCloud(refusal=Refusal(kind=kind, reason=reason, version=wire.VERSION)).SerializeToString()
