"""The cloud on a network: streams of devices, which open sessions or come back to them."""

import asyncio
import concurrent.futures
import contextlib
import logging
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc

from spa_jax.engine.engine import NoRoom
from spa_jax.errors import UserError
from spa_jax.split import metrics, wire
from spa_jax.split.admission import Admission, Limits, Refused
from spa_jax.split.grpc_channel import CLOUD_OPTIONS, MAX_BYTES_OPEN, METHOD, SERVICE, ServerSecurity
from spa_jax.split.health import Health
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Opened, Queued, Refusal, Reopen, Working
from spa_jax.split.plan import GenerationPlan
from spa_jax.split.server_session import SIGN_EVERY, ServerSession
from spa_jax.split.session import Cloud
from spa_jax.split.sessions import Sessions
from spa_jax.split.streams import Line, Room, address_of
from spa_jax.split.tokens import DeviceTokens, Guesses

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Tell = Callable[[FromCloud], Awaitable[None]]
"""Sends a message to a device."""
MAX_REASON_LENGTH = 1000
"""Most characters of a refusal, which may repeat what the device asked for."""
MAX_GUESSES, MAX_GUESSES_OF_ONE = 256, 8
"""Streams at once whose token waits before it is looked at, of all addresses and of one."""
MAX_SILENT = 64
"""Streams at once that have shown a token and have yet to send their first message, each of which may be long."""
FILES_READ_EVERY = 1.0
"""Seconds between two looks at whether the file of tokens has changed."""


class Server:
    """A cloud that serves sessions over gRPC.

    Attributes:
        admission: who may begin.
        health: gRPC's health service.
    """

    def __init__(self, cloud: Cloud, limits: Limits, security: ServerSecurity) -> None:
        """Serves the devices that have one of the tokens; all devices if there are none.

        Raises:
            UserError: the tokens cannot be used.
        """
        self._cloud, self._limits, self._security, self._tokens = cloud, limits, security, DeviceTokens(security)
        self._guesses = Guesses()
        cloud.engine.slots.bound(limits.memory)
        self.admission = Admission(limits, self._tokens.has_any)
        self._sessions = Sessions(cloud.engine, self.admission, limits)
        self.health = Health(limits.open_seconds)
        self._guessing = Room(MAX_GUESSES, MAX_GUESSES_OF_ONE)
        self._silent, self._planned = Room(MAX_SILENT), Room(limits.sessions + limits.queue)
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._plans = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="plans")
        self._rereading = asyncio.create_task(self._reread_tokens())

    async def generate(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serves the one method: a stream of `FromDevice`, answered by one of `FromCloud`, both as bytes."""
        metadata = dict(context.invocation_metadata() or ())
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        address, line = address_of(context.peer()), Line(context)

        async def tell(message: FromCloud) -> None:
            await line.write(message.SerializeToString(), self._limits.open_seconds)

        try:
            if not await self._is_known(token, address):
                await line.end(grpc.StatusCode.UNAUTHENTICATED, "this device token is unknown to the cloud")
            try:
                session = await self._find_or_open(requests, token, token if self._tokens.has_any else address, tell)
            except Refused as error:
                await tell(_refusal(error.kind, str(error)))
                return
            except UserError as error:
                await tell(_refusal("refused", str(error)))
                return
            await self._serve(session, requests, line)
        except (TimeoutError, StopAsyncIteration):
            await line.end(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream did not say what it wants")

    async def warm(self, longest: int) -> None:
        """Compiles the programs for prompts and answers of up to `longest` tokens; the health service says meanwhile
        that this cloud does not serve."""
        self.health.set(False, SERVICE)
        calls = self._cloud.engine.warm(longest)
        while left := await self._sessions.run_program(lambda: next(calls, 0)):
            log.info("%d programs are left to be compiled", left)
        self.health.set(True, SERVICE)

    async def drain(self, seconds: float) -> None:
        """Begins no session any more, and waits so long for those under way."""
        self.health.stop()
        self.admission.close()
        await self._sessions.drain(seconds)

    async def close(self) -> None:
        """Stops all sessions; no stream may be left that could open another one."""
        self._rereading.cancel()
        await self._sessions.close()
        self._plans.shutdown(wait=True, cancel_futures=True)

    async def _reread_tokens(self) -> None:
        """Reads the tokens again when they have changed, and ends the sessions of those that were taken away."""
        while True:
            await asyncio.sleep(FILES_READ_EVERY)
            if self._tokens.refresh():
                self._sessions.end_unknown(self._tokens.knows)

    async def _is_known(self, token: str, address: str) -> bool:
        """Looks at a token, at once or, where wrong ones came from its address, after a while.

        Raises:
            TimeoutError: too many wait.
        """
        if not self._tokens.has_any:
            return True
        if seconds := self._guesses.wait(address, token):
            async with self._guessing.stay(address, None):
                await asyncio.sleep(seconds)
        is_known = self._tokens.knows(token)
        self._guesses.add(address, token, is_known)
        return is_known

    async def _find_or_open(self, requests: AsyncIterator[bytes], token: str, owner: str, tell: Tell) -> ServerSession:
        """Opens or finds the session that a stream's first message asks for.

        Raises:
            Refused: there is no such session, no room for another one, or no time to read its prompts.
            UserError: the message makes no sense.
            TimeoutError: it does not come.
        """
        async with self._silent.stay(owner, self._limits.open_seconds):
            first = await anext(requests)
        metrics.BYTES_UP.inc(len(first))
        if len(first) > MAX_BYTES_OPEN:
            raise UserError(f"the first message has {len(first)} bytes, and the cloud takes at most {MAX_BYTES_OPEN}")
        message = wire.parse(FromDevice, first)
        if message.WhichOneof("message") == "reopen":
            return self._find(message.reopen, token)
        if message.WhichOneof("message") != "open":
            raise UserError("the first message must open a session")
        turn = self._turns.setdefault(owner, asyncio.Lock())  # so that long prompts hold up those of their owner alone
        try:
            async with self._planned.stay(owner, self._limits.open_seconds), turn:
                planning = asyncio.get_running_loop().run_in_executor(self._plans, self._cloud.plan, message.open)
                plan = await _await_with_signs(planning, tell)
        except TimeoutError:
            raise Refused("overloaded", "the cloud is busy reading prompts: try again") from None
        return await self._open(plan, token, owner, tell)

    def _find(self, message: Reopen, token: str) -> ServerSession:
        """Finds the session that a stream's first message reopens.

        Raises:
            Refused: there is no such session.
        """
        found = self._sessions.find(message.session, token)
        if found is None:
            raise Refused("unknown-session", "the cloud has no such session any more: generate again")
        if message.step > found.prompt_step:
            found.prompt_messages = []
        return found

    async def _open(self, plan: GenerationPlan, token: str, owner: str, tell: Tell) -> ServerSession:
        """Opens a session as soon as there is room for it, and tells its device until then its place in the queue.

        Raises:
            Refused: there is no room for another one, or its token was taken away meanwhile.
            TimeoutError: the device does not listen.
        """
        opened_at = time.perf_counter()
        namespace, applicant = self._security.namespace(token), self.admission.join(owner, plan.bytes, plan.cost)
        try:
            generation = None
            while generation is None:
                async for place in self.admission.places(applicant):
                    await tell(FromCloud(queued=Queued(place=place)))
                    self._check_known(token)
                try:
                    beginning = self._sessions.run_program(lambda: self._cloud.begin(plan, namespace))
                    generation = await _await_with_signs(beginning, tell)
                except NoRoom as error:
                    if not self.admission.put_back(applicant):
                        raise Refused("overloaded", str(error)) from error
            self._check_known(token)
        except BaseException:
            self.admission.leave(applicant)
            raise
        metrics.SECONDS_IN_QUEUE.observe(time.perf_counter() - opened_at)
        session = ServerSession(generation, token, applicant, opened_at)
        self._sessions.start(session)
        log.info("session %s opened: %d prompts", generation.id, len(plan.prompts))
        return session

    def _check_known(self, token: str) -> None:
        """Checks a token that was known once.

        Raises:
            Refused: it is not any more.
        """
        if not self._tokens.knows(token):
            raise Refused("unknown-token", "this device token is not known to the cloud any more")

    async def _serve(self, session: ServerSession, requests: AsyncIterator[bytes], line: Line) -> None:
        """Attaches a stream to its session, until either ends.

        Raises:
            TimeoutError: the device does not take what it is sent.
        """
        outbox, lengths = session.attach(), session.generation.lengths
        name, backbone = session.generation.id, self._cloud.fingerprint
        opened = Opened(session=name, version=wire.VERSION, lengths=lengths, backbone=backbone)
        outbox.put_latest(FromCloud(opened=opened))
        session.send_current()
        reader, num_sent = asyncio.create_task(_read(session, requests)), [(0, 0)] * len(lengths)
        try:
            async for news in outbox.messages():
                message = news or FromCloud(working=Working(tokens=session.generation.num_generated))
                if message.HasField("progress"):
                    message.progress.CopyFrom(session.progress(num_sent))
                data = message.SerializeToString()
                metrics.BYTES_DOWN.inc(len(data))
                await line.write(data, self._limits.abandoned)
                if message.HasField("refusal") or (message.HasField("progress") and message.progress.done):
                    break
        finally:
            reader.cancel()
            self._sessions.detach(session, outbox)


async def _await_with_signs(work: Awaitable[Result], tell: Tell) -> Result:
    """Waits for some work, and tells the device whenever a sign of life is due."""
    running = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([running], timeout=SIGN_EVERY))[0]:
            await tell(FromCloud(working=Working()))
        return running.result()
    finally:
        running.cancel()


async def _read(session: ServerSession, requests: AsyncIterator[bytes]) -> None:
    """Takes a device's replies until its stream ends."""
    with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
        async for data in requests:
            metrics.BYTES_UP.inc(len(data))
            try:
                if len(data) > session.generation.plan.reply_bytes:
                    raise wire.WireError("a message came that is longer than any reply")
                message = wire.parse(FromDevice, data)
            except wire.WireError:
                metrics.DROPPED.inc()
                continue
            kind = message.WhichOneof("message")
            if kind == "cancel":
                session.cancel()
            elif kind != "reply" or not session.take(message.reply):
                metrics.DROPPED.inc()


@contextlib.asynccontextmanager
async def serving(
    cloud: Cloud, address: str, limits: Limits, security: ServerSecurity
) -> AsyncIterator[tuple[Server, int]]:
    """Starts a server with gRPC's health service beside ours, gives it and its port, and ends its sessions on leaving.

    Raises:
        UserError: certificates or tokens that cannot be used, or an address that is taken.
    """
    service = Server(cloud, limits.check(), security)
    server = grpc.aio.server(options=CLOUD_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(service.generate)
    own = grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})
    server.add_generic_rpc_handlers((own, service.health.handler()))
    credentials = security.credentials()
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise UserError(f"cannot listen on {address}: {error}") from error
    await server.start()
    try:
        with metrics.watching(cloud.engine, service.admission):
            yield service, port
    finally:
        await service.drain(0)
        await server.stop(grace=1)
        await service.close()


def _refusal(kind: str, reason: str) -> FromCloud:
    reason = reason[:MAX_REASON_LENGTH]
    log.info("refused: %s", reason)
    return FromCloud(refusal=Refusal(kind=kind, reason=reason, version=wire.VERSION))
