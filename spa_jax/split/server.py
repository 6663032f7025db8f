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
from spa_jax.split.live import LiveSession
from spa_jax.split.messages_pb2 import (
    FromCloud,
    FromDevice,
    Generated,
    Opened,
    Progress,
    Refusal,
)
from spa_jax.split.session import Cloud

log = logging.getLogger(__name__)
Result = TypeVar("Result")
LONGEST_REASON = 1000
"""Characters of a refusal, which may repeat what the device asked for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a cloud lets devices use.

    Attributes:
        sessions: generations under way at once, of all devices.
        sessions_per_token: of one device token.
        memory: bytes of the caches of all sessions under way.
        deadline: seconds a device has for an answer.
        first_deadline: for its first one, if that is longer: a device compiles its programs then.
        linger: seconds a finished session is kept for a device that lost its connection; at most `sessions` are.
        open_seconds: seconds a stream may take to say what it wants.
    """

    sessions: int = 64
    sessions_per_token: int = 8
    memory: int = 4 * 2**30
    deadline: float = 1.0
    first_deadline: float = 10.0
    linger: float = 30.0
    open_seconds: float = 10.0

    def check(self) -> "Limits":
        """Raises:
        UserError: limits nothing could be within, by name."""
        for name, value in dataclasses.asdict(self).items():
            if not (value > 0 or (value == 0 and name in ("linger", "first_deadline"))):
                raise UserError(f"{name} is {value}, but must be above 0")
        return self


class Server:
    """A cloud that serves sessions over gRPC."""

    def __init__(self, cloud: Cloud, limits: Limits, tokens: frozenset[str] | None) -> None:
        self._cloud, self._limits, self._tokens = cloud, limits, tokens
        self._live: dict[str, LiveSession] = {}
        self._opening: list[tuple[str, int]] = []  # token and memory of the sessions whose prompts are running
        self._programs = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="programs")

    async def generate(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """The one method: a stream of `FromDevice`, answered by one of `FromCloud`, both as bytes."""
        metadata = dict(context.invocation_metadata() or ())
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if not self._serves(token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this device token is unknown to the cloud")
        try:
            first = await asyncio.wait_for(anext(requests), self._limits.open_seconds)
            metrics.BYTES_UP.inc(len(first))
            live = await self._begin(wire.parse(FromDevice, first), token)
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
        """Stops all sessions; no stream may be left that could open another one."""
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._programs.shutdown(wait=True, cancel_futures=True)

    async def _begin(self, message: FromDevice, token: str) -> LiveSession:
        kind = message.WhichOneof("message")
        if kind == "reopen":
            found = self._live.get(message.reopen.session)
            if found is None or found.token != token:
                raise Refused("unknown-session", "the cloud has no such session any more: generate again")
            if message.reopen.step:
                found.prompt = []
            return found
        if kind != "open":
            raise UserError("the first message must open a session")
        plan = await self._run(lambda: self._cloud.plan(message.open))
        began = time.perf_counter()
        self._check_room(plan.bytes, token)
        self._opening.append((token, plan.bytes))
        try:
            live = await self._run(lambda: LiveSession(self._cloud.begin(plan), token, plan.bytes, began))
        finally:
            self._opening.remove((token, plan.bytes))
        session = live.session
        self._live[session.id] = live
        metrics.SESSIONS.inc()
        live.task = asyncio.create_task(self._drive(live))
        log.info("session %s opened: %d prompts", session.id, len(message.open.prompts))
        return live

    def _serves(self, token: str) -> bool:
        """Compares with every token to the end, so that the time it takes tells nothing about them."""
        given = token.encode(errors="replace")
        return self._tokens is None or sum(hmac.compare_digest(given, known.encode()) for known in self._tokens) > 0

    def _check_room(self, memory: int, token: str) -> None:
        limits = self._limits
        taken = [*self._opening, *((live.token, live.memory) for live in self._live.values() if live.under_way)]
        mine = sum(owner == token for owner, _ in taken)
        if memory > limits.memory:
            raise UserError(
                f"this generation takes {memory / 2**20:.0f} MiB, and the cloud has {limits.memory / 2**20:.0f}: "
                "ask for fewer new tokens, prompts or beams"
            )
        if len(taken) >= limits.sessions:
            raise Refused("overloaded", "the cloud has as many sessions as it can take: try again later")
        if self._tokens is not None and mine >= limits.sessions_per_token:
            raise Refused("overloaded", f"this device token has {mine} sessions under way: try again later")
        if memory + sum(size for _, size in taken) > limits.memory:
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
            live.say(live.result)
        elif live.question is not None:
            live.say(FromCloud(taps=live.question))

    async def _drive(self, live: LiveSession) -> None:
        """Runs a session to its end, whoever is attached, and keeps its result for a while."""
        session = live.session
        try:
            await self._generate(live)
            self._release(live)
            await asyncio.sleep(self._limits.linger)
        except asyncio.CancelledError:
            if live.under_way:
                log.info("session %s cancelled", session.id)
        except Exception as error:
            log.exception("session %s failed", session.id)
            live.say(FromCloud(refusal=Refusal(kind="failed", reason=type(error).__name__, version=wire.VERSION)))
        finally:
            self._release(live)
            self._live.pop(session.id, None)
            if live.outbox is not None:
                live.outbox.close()

    async def _generate(self, live: LiveSession) -> None:
        session, reported = live.session, False

        def first_token() -> None:
            nonlocal reported
            if not reported:
                metrics.SECONDS_TO_FIRST_TOKEN.observe(time.perf_counter() - live.began)
            reported = True

        while (question := await self._run(session.wanted)) is not None:
            live.question = question
            live.say(FromCloud(taps=question))
            metrics.EXCHANGES.inc()
            await self._settle(live, question.step)
            live.question = None
            first_token()
            if session.config.beams is None:
                live.say(await self._run(lambda: self._progress(live, done=False)))
        live.result = await self._run(lambda: self._progress(live, done=True))
        first_token()
        live.say(live.result)
        count = sum(len(generated.tokens) for generated in live.result.progress.generated)
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

    def _release(self, live: LiveSession) -> None:
        """Makes room for another session; the results of not too many that are over stay."""
        if not live.under_way:
            return
        live.under_way = False
        metrics.SESSIONS.dec()
        self._programs.submit(live.session.forget)  # not here: one of its programs may be running
        over = [other for other in self._live.values() if not other.under_way]
        for other in over[: -self._limits.sessions]:
            if other.task is not None:
                other.task.cancel()

    async def _settle(self, live: LiveSession, step: int) -> None:
        """Waits for an answer that makes sense until the deadline, then goes on with it or without one."""
        began = time.monotonic()
        until = began + self._limits.deadline
        if step == 1:
            until = max(until, began + self._limits.first_deadline)
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

    def _progress(self, live: LiveSession, done: bool) -> FromCloud:
        parts = [
            Generated(tokens=g.tokens, consulted=g.consulted, score=g.score or 0.0, pieces=self._cloud.pieces(g))
            for g in live.session.result()
        ]
        return FromCloud(progress=Progress(generated=parts, done=done, degraded=live.session.degraded))

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
    sessions = Server(cloud, limits.check(), security.device_tokens())
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
        await checks.enter_graceful_shutdown()
        await server.stop(grace=1)
        await sessions.close()


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
    reason = reason[:LONGEST_REASON]
    log.info("refused: %s", reason)
    return FromCloud(refusal=Refusal(kind=kind, reason=reason, version=wire.VERSION)).SerializeToString()
