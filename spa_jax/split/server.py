"""The cloud on a network: sessions that outlive their connections, and never wait for a device without a deadline.

Each session is a task of its own. A device attaches to it with a stream; when the stream goes, the session goes on:
what it asks is not answered in time, and its tokens are finished from f alone, until the device comes back with the
session's id. Programs run one at a time in one thread, a step of one session after a step of another.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from spa_jax.decoding.hypotheses import Generation
from spa_jax.errors import UserError
from spa_jax.split import metrics, wire
from spa_jax.split.grpc_channel import CLOUD_OPTIONS, METHOD, SERVICE, ServerSecurity
from spa_jax.split.messages_pb2 import (
    FromCloud,
    FromDevice,
    Generated,
    Opened,
    Progress,
    Refusal,
    Reply,
    Taps,
)
from spa_jax.split.session import Cloud, Session

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a cloud lets devices use.

    Attributes:
        sessions: generations under way at once, of all devices.
        sessions_per_token: of one device token.
        memory: bytes of the caches of all sessions under way.
        deadline: seconds a device has for an answer.
        linger: seconds a finished session is kept for a device that lost its connection.
        open_seconds: seconds a stream may take to say what it wants.
    """

    sessions: int = 64
    sessions_per_token: int = 8
    memory: int = 4 * 2**30
    deadline: float = 1.0
    linger: float = 30.0
    open_seconds: float = 10.0


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
        self.result: list[Generation] | None = None
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


class Server:
    """A cloud that serves sessions over gRPC."""

    def __init__(self, cloud: Cloud, limits: Limits, tokens: frozenset[str] | None) -> None:
        self._cloud, self._limits, self._tokens = cloud, limits, tokens
        self._live: dict[str, LiveSession] = {}
        self._opening: list[int] = []  # memory of the sessions whose prompts are running
        self._programs = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="programs")

    async def generate(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """The one method: a stream of `FromDevice`, answered by one of `FromCloud`, both as bytes."""
        metadata = dict(context.invocation_metadata() or ())
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if self._tokens is not None and token not in self._tokens:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this device token is unknown to the cloud")
        try:
            first = await asyncio.wait_for(anext(requests), self._limits.open_seconds)
            live = await self._begin(wire.parse(FromDevice, first), token)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream did not say what it wants")
        except Refused as error:
            yield _refusal(error.kind, str(error))
            return
        except UserError as error:
            yield _refusal("refused", str(error))
            return
        outbox, session = live.attach(), live.session
        opened = Opened(session=session.id, version=wire.VERSION, lengths=session.lengths)
        outbox.put(FromCloud(opened=opened))
        self._catch_up(live)
        reader, brought = asyncio.create_task(self._read(live, requests)), [0] * len(session.lengths)
        try:
            async for message in outbox.messages():
                data = _news(message, brought).SerializeToString()
                metrics.BYTES_DOWN.inc(len(data))
                yield data
                if message.HasField("refusal") or (message.HasField("progress") and message.progress.done):
                    break
        finally:
            reader.cancel()
            live.detach(outbox)

    async def close(self) -> None:
        """Stops all sessions."""
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._programs.shutdown(wait=True, cancel_futures=True)

    async def _begin(self, message: FromDevice, token: str) -> LiveSession:
        kind = message.WhichOneof("message")
        if kind == "reopen":
            live = self._live.get(message.reopen.session)
            if live is None or live.token != token:
                raise Refused("unknown-session", "the cloud has no such session any more: generate again")
            return live
        if kind != "open":
            raise UserError("the first message must open a session")
        plan = await self._run(lambda: self._cloud.plan(message.open))
        began = time.perf_counter()
        self._check_room(plan.bytes, token)
        self._opening.append(plan.bytes)
        try:
            live = LiveSession(await self._run(lambda: self._cloud.begin(plan)), token, plan.bytes, began)
        finally:
            self._opening.remove(plan.bytes)
        session = live.session
        self._live[session.id] = live
        metrics.SESSIONS.inc()
        live.task = asyncio.create_task(self._drive(live))
        log.info("session %s opened: %d prompts", session.id, len(message.open.prompts))
        return live

    def _check_room(self, memory: int, token: str) -> None:
        limits, mine = self._limits, sum(live.token == token for live in self._live.values())
        if memory > limits.memory:
            raise UserError(
                f"this generation takes {memory / 2**20:.0f} MiB, and the cloud has {limits.memory / 2**20:.0f}: "
                "ask for fewer new tokens, prompts or beams"
            )
        if len(self._live) + len(self._opening) >= limits.sessions:
            raise Refused("overloaded", "the cloud has as many sessions as it can take: try again later")
        if self._tokens is not None and mine >= limits.sessions_per_token:
            raise Refused("overloaded", f"this device token has {mine} sessions under way: try again later")
        if memory + sum(self._opening) + sum(live.memory for live in self._live.values()) > limits.memory:
            raise Refused("overloaded", "the cloud's memory is taken by other sessions: try again later")

    async def _read(self, live: LiveSession, requests: AsyncIterator[bytes]) -> None:
        """Takes the device's answers until its stream ends."""
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            async for data in requests:
                metrics.BYTES_UP.inc(len(data))
                try:
                    message = wire.parse(FromDevice, data)
                except wire.WireError:
                    metrics.DROPPED.inc()
                    continue
                kind = message.WhichOneof("message")
                if kind == "cancel" and live.task is not None:
                    live.task.cancel()
                elif kind == "reply" and not live.answers.full():
                    live.answers.put_nowait(message.reply)
                else:
                    metrics.DROPPED.inc()

    def _catch_up(self, live: LiveSession) -> None:
        """What a device that has just attached must know: the prompt's taps, and what is asked or done."""
        for part in live.prompt:
            live.say(FromCloud(taps=part))
        if live.result is not None:
            self._report(live, live.result, done=True)
        elif live.question is not None:
            live.say(FromCloud(taps=live.question))

    async def _drive(self, live: LiveSession) -> None:
        """Runs a session to its end, whoever is attached."""
        session, reported = live.session, False
        try:
            while (question := await self._run(session.wanted)) is not None:
                live.question = question
                live.say(FromCloud(taps=question))
                metrics.EXCHANGES.inc()
                await self._settle(live, question.step)
                live.question = None
                if not reported:
                    metrics.SECONDS_TO_FIRST_TOKEN.observe(time.perf_counter() - live.began)
                    reported = True
                if session.config.beams is None:
                    self._report(live, await self._run(session.result), done=False)
            live.result = await self._run(session.result)
            self._report(live, live.result, done=True)
            count = sum(len(generation.tokens) for generation in live.result)
            metrics.TOKENS.inc(count)
            metrics.DEGRADED.inc(session.degraded)
            metrics.SECONDS_PER_TOKEN.observe((time.perf_counter() - live.began) / max(count, 1))
            log.info(
                "session %s: %d tokens, %d degraded, %.4f s of questions being out",
                session.id,
                count,
                session.degraded,
                live.seconds_out,
            )
            live.session.forget()
            live.memory = 0
            await asyncio.sleep(self._limits.linger if live.outbox is None else min(1.0, self._limits.linger))
        except asyncio.CancelledError:
            log.info("session %s cancelled", session.id)
        except Exception as error:
            log.exception("session %s failed", session.id)
            live.say(FromCloud(refusal=Refusal(kind="failed", reason=type(error).__name__, version=wire.VERSION)))
        finally:
            self._live.pop(session.id, None)
            metrics.SESSIONS.dec()
            if live.outbox is not None:
                live.outbox.close()

    async def _settle(self, live: LiveSession, step: int) -> None:
        """Waits for an answer that makes sense until the deadline, then goes on with it or without one."""
        began = time.monotonic()
        until = began + self._limits.deadline
        while True:
            try:
                answer = await asyncio.wait_for(live.answers.get(), max(until - time.monotonic(), 0))
            except TimeoutError:
                live.waited(time.monotonic() - began)
                break
            if answer.step != step:
                metrics.DROPPED.inc()
                continue
            live.waited(time.monotonic() - began)
            try:
                await self._run(functools.partial(live.session.resume, answer))
                live.prompt = []
                return
            except wire.WireError as error:
                metrics.DROPPED.inc()
                log.warning("session %s: %s", live.session.id, error)
                break
        await self._run(lambda: live.session.resume(None))

    def _report(self, live: LiveSession, generations: list[Generation], done: bool) -> None:
        parts = [
            Generated(tokens=g.tokens, consulted=g.consulted, score=g.score or 0.0, pieces=self._cloud.pieces(g))
            for g in generations
        ]
        live.say(FromCloud(progress=Progress(generated=parts, done=done, degraded=live.session.degraded)))

    async def _run(self, program: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._programs, program)


@contextlib.asynccontextmanager
async def serving(
    cloud: Cloud, address: str, limits: Limits, security: ServerSecurity
) -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    """A running server and its port, with gRPC's health service beside ours; ends its sessions on leaving.

    Raises:
        UserError: certificates or tokens that cannot be used, or an address that is taken.
    """
    sessions = Server(cloud, limits, security.device_tokens())
    server = grpc.aio.server(options=CLOUD_OPTIONS, maximum_concurrent_rpcs=4 * limits.sessions)
    handler = grpc.stream_stream_rpc_method_handler(sessions.generate)
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
        await sessions.close()
        await server.stop(grace=1)


class Refused(UserError):
    """A refusal of another kind than a request that makes no sense."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _news(message: FromCloud, brought: list[int]) -> FromCloud:
    """The message without the tokens that its stream has brought before, of each prompt as many as `brought` says."""
    if not message.HasField("progress"):
        return message
    news = FromCloud()
    news.CopyFrom(message)
    for prompt, generated in enumerate(news.progress.generated):
        generated.begin, brought[prompt] = brought[prompt], len(generated.tokens)
        for field in (generated.tokens, generated.consulted, generated.pieces):
            del field[: generated.begin]
    return news


def _refusal(kind: str, reason: str) -> bytes:
    log.info("refused: %s", reason)
    return FromCloud(refusal=Refusal(kind=kind, reason=reason, version=wire.VERSION)).SerializeToString()
