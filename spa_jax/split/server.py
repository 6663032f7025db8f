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
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from spa_jax.decoding.hypotheses import Generation
from spa_jax.errors import UserError
from spa_jax.split import metrics, wire
from spa_jax.split.generation import hypotheses_of
from spa_jax.split.grpc_channel import METHOD, OPTIONS, SERVICE, ServerSecurity
from spa_jax.split.messages_pb2 import (
    Correction,
    FromCloud,
    FromDevice,
    Generated,
    Open,
    Opened,
    Progress,
    Refusal,
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
        new_tokens: most tokens of a generation, of all its prompts and beams together.
        deadline: seconds a device has for an answer.
        linger: seconds a finished session is kept for a device that lost its connection.
        open_seconds: seconds a stream may take to say what it wants.
    """

    sessions: int = 64
    sessions_per_token: int = 8
    new_tokens: int = 8192
    deadline: float = 1.0
    linger: float = 30.0
    open_seconds: float = 10.0


class LiveSession:
    """A session, its task, and the stream that is attached to it now."""

    def __init__(self, session: Session, token: str, prompt: list[Taps]) -> None:
        self.session, self.token = session, token
        self.prompt: list[Taps] = prompt
        self.outbox: asyncio.Queue[FromCloud | None] | None = None
        self.question: Taps | None = None
        self.answers: asyncio.Queue[Correction] = asyncio.Queue(maxsize=8)
        self.result: list[Generation] | None = None
        self.task: asyncio.Task[None] | None = None

    def attach(self) -> "asyncio.Queue[FromCloud | None]":
        """A new outbox; the stream of the old one, if any, ends."""
        if self.outbox is not None:
            self.outbox.put_nowait(None)
        self.outbox = asyncio.Queue()
        return self.outbox

    def detach(self, outbox: "asyncio.Queue[FromCloud | None]") -> None:
        """The stream of this outbox is gone."""
        if self.outbox is outbox:
            self.outbox = None

    def say(self, message: FromCloud) -> None:
        """To the device that is attached, if one is."""
        if self.outbox is not None:
            self.outbox.put_nowait(message)


class Server:
    """A cloud that serves sessions over gRPC."""

    def __init__(self, cloud: Cloud, limits: Limits, tokens: frozenset[str] | None) -> None:
        self._cloud, self._limits, self._tokens = cloud, limits, tokens
        self._live: dict[str, LiveSession] = {}
        self._opening = 0  # sessions whose prompt is running, which take room as well
        self._programs = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="programs")

    async def generate(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """The one method: a stream of `FromDevice`, answered by one of `FromCloud`, both as bytes."""
        metadata = dict(context.invocation_metadata() or ())
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if self._tokens is not None and token not in self._tokens:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this device token is unknown to the cloud")
        try:
            first = await asyncio.wait_for(anext(requests), self._limits.open_seconds)
            live = await self._begin(FromDevice.FromString(first), token)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream did not say what it wants")
        except DecodeError:
            yield _refusal("refused", "the first message is none of this protocol")
            return
        except _Overloaded as error:
            yield _refusal("overloaded", str(error))
            return
        except _Unknown as error:
            yield _refusal("unknown-session", str(error))
            return
        except UserError as error:
            yield _refusal("refused", str(error))
            return
        outbox, session = live.attach(), live.session
        opened = Opened(session=session.id, version=wire.VERSION, longest=session.longest)
        outbox.put_nowait(FromCloud(opened=opened))
        self._catch_up(live)
        reader = asyncio.create_task(self._read(live, requests))
        try:
            while (message := await outbox.get()) is not None:
                yield message.SerializeToString()
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
                raise _Unknown("the cloud has no such session any more: generate again")
            return live
        if kind != "open":
            raise UserError("the first message must open a session")
        self._check_room(message.open, token)
        self._opening += 1
        try:
            session, prompt = await self._run(lambda: self._open(message.open))
        finally:
            self._opening -= 1
        live = LiveSession(session, token, prompt)
        self._live[session.id] = live
        metrics.SESSIONS.inc()
        live.task = asyncio.create_task(self._drive(live))
        log.info("session %s opened: %d prompts", session.id, len(message.open.prompts))
        return live

    def _open(self, request: Open) -> tuple[Session, list[Taps]]:
        session = self._cloud.open(request)
        return session, session.prompt_messages()

    def _check_room(self, request: Open, token: str) -> None:
        mine = sum(live.token == token for live in self._live.values())
        if len(self._live) + self._opening >= self._limits.sessions or mine >= self._limits.sessions_per_token:
            raise _Overloaded("the cloud has as many sessions as it can take: try again later")
        beams = hypotheses_of(request)
        if request.max_new_tokens * len(request.prompts) * beams > self._limits.new_tokens:
            raise UserError(
                f"{request.max_new_tokens} new tokens for {len(request.prompts)} prompts and {beams} hypotheses are "
                f"more than this cloud's {self._limits.new_tokens}: ask for fewer"
            )

    async def _read(self, live: LiveSession, requests: AsyncIterator[bytes]) -> None:
        """Takes the device's answers until its stream ends."""
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            async for data in requests:
                try:
                    message = FromDevice.FromString(data)
                except DecodeError:
                    metrics.DROPPED.inc()
                    continue
                kind = message.WhichOneof("message")
                if kind == "cancel" and live.task is not None:
                    live.task.cancel()
                elif kind == "correction" and not live.answers.full():
                    live.answers.put_nowait(message.correction)
                else:
                    metrics.DROPPED.inc()

    def _catch_up(self, live: LiveSession) -> None:
        """What a device that has just attached must know: the prompt's taps, and what is asked or done."""
        for part in live.prompt:
            live.say(FromCloud(taps=part))
        live.prompt = []
        if live.result is not None:
            self._report(live, live.result, done=True)
        elif live.question is not None:
            live.say(FromCloud(taps=live.question))

    async def _drive(self, live: LiveSession) -> None:
        """Runs a session to its end, whoever is attached."""
        session, began, reported = live.session, time.perf_counter(), False
        try:
            while (question := await self._run(session.wanted)) is not None:
                live.question = question
                live.say(FromCloud(taps=question))
                metrics.EXCHANGES.inc()
                await self._settle(live, question.step)
                live.question = None
                if not reported:
                    metrics.SECONDS_TO_FIRST_TOKEN.observe(time.perf_counter() - began)
                    reported = True
                if session.config.beams is None:
                    self._report(live, await self._run(session.result), done=False)
            live.result = await self._run(session.result)
            self._report(live, live.result, done=True)
            count = sum(len(generation.tokens) for generation in live.result)
            metrics.TOKENS.inc(count)
            metrics.DEGRADED.inc(session.degraded)
            metrics.SECONDS_PER_TOKEN.observe((time.perf_counter() - began) / max(count, 1))
            log.info("session %s: %d tokens, %d degraded", session.id, count, session.degraded)
            live.session.forget()
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
                live.outbox.put_nowait(None)

    async def _settle(self, live: LiveSession, step: int) -> None:
        """Waits for an answer that makes sense until the deadline, then goes on with it or without one."""
        until = time.monotonic() + self._limits.deadline
        while True:
            try:
                answer = await asyncio.wait_for(live.answers.get(), max(until - time.monotonic(), 0))
            except TimeoutError:
                break
            if answer.step != step:
                metrics.DROPPED.inc()
                continue
            try:
                await self._run(functools.partial(live.session.resume, answer))
                return
            except wire.WireError as error:
                metrics.DROPPED.inc()
                log.warning("session %s: %s", live.session.id, error)
                break
        await self._run(lambda: live.session.resume(None))

    def _report(self, live: LiveSession, generations: list[Generation], done: bool) -> None:
        parts = [
            Generated(tokens=g.tokens, consulted=g.consulted, score=g.score or 0.0, text=self._cloud.text(g))
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
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=4 * limits.sessions)
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


class _Overloaded(Exception):
    pass


class _Unknown(Exception):
    pass


def _refusal(kind: str, reason: str) -> bytes:
    log.info("refused: %s", reason)
    return FromCloud(refusal=Refusal(kind=kind, reason=reason, version=wire.VERSION)).SerializeToString()
