"""The device as a local server that speaks OpenAI's API, and shows a page to talk with it."""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from spa_jax.choices import Setting
from spa_jax.decoding.settings import resolve_setting
from spa_jax.endpoint.answers import Answers
from spa_jax.endpoint.requests import Ask, ChatRequest, Defaults, Request, TextRequest, parse, resolve
from spa_jax.errors import UserError
from spa_jax.split.channel import Traffic
from spa_jax.split.client import OnProgress, RemoteResult, generate
from spa_jax.split.connection import Connection
from spa_jax.split.messages_pb2 import Progress
from spa_jax.split.refusals import Busy, Unfinished, Unserved
from spa_jax.split.request import open_message
from spa_jax.split.waiting import OnWait
from spa_jax.split.wire import WireError
from spa_jax.weights.plugin import Plugin

BASE = "base"
"""Name of the model that is the backbone alone."""
MAX_BODY = 2**22
"""Most bytes of a request."""
BODY_SECONDS = 30.0
"""How long a request may take to come."""
SIGN_SECONDS = 5.0
"""After so long without a token, a stream has a sign of life: a comment, which clients skip, and the page shows."""
STOPS = "the device stops"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A device, and all that it serves.

    Attributes:
        plugins: by the names of their models.
        connection: to the cloud.
        defaults: what holds where a request does not say.
        key: that clients must show; empty for none.
        running: the generations under way.
    """

    plugins: Mapping[str, Plugin]
    connection: Connection
    defaults: Defaults = dataclasses.field(default_factory=Defaults)
    key: str = ""
    running: "set[Answering]" = dataclasses.field(default_factory=set, init=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses defaults that one of the plugins cannot run with.

        Raises:
            UserError: such a default.
        """
        for name in self.plugins:
            self._described(name)

    def check(self) -> "Endpoint":
        """Returns itself.

        Raises:
            UserError: a plugin cannot run as the defaults say.
        """
        for plugin in self.plugins.values():
            self._mode_of(plugin)
        return self

    def app(self) -> Starlette:
        """Makes the application."""
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._text), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _server_error})

    def _guarded(self, handle: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        """Refuses whoever does not show the key, and what the page of another site asks for in a browser."""

        async def guarded(request: HttpRequest) -> Response:
            origin = request.headers.get("origin")
            if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
                return error_response(403, f"requests of pages from {origin} are not answered", "permission_error")
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
                return error_response(401, "the API key is missing or wrong", "authentication_error", "invalid_api_key")
            try:
                return await handle(request)
            except asyncio.CancelledError:  # the server stops, and would print a traceback
                return error_response(503, STOPS, "api_error")

        return guarded

    def stop(self) -> None:
        """Ends the generations under way, of which each client is told."""
        for answering in self.running:
            answering.stop()

    async def _page(self, _: HttpRequest) -> Response:
        page = importlib.resources.files("spa_jax.endpoint").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    async def _health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in (*self.plugins, BASE)]})

    async def _model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name not in self.plugins and name != BASE:
            return self._unknown(name)
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        described = {"id": name, "object": "model", "created": 0, "owned_by": "spa_jax"}
        if name == BASE:
            return described
        plugin = self.plugins[name]
        setting, threshold = self._mode_of(plugin)
        config = {"entry": plugin.config.entry, "edits": plugin.config.edits, "backbone": plugin.backbone}
        return {**described, "spa": {"setting": setting, "threshold": threshold, **config}}

    def _mode_of(self, plugin: Plugin) -> tuple[str, float]:
        return resolve_setting(plugin.config, self.defaults.mode.setting, self.defaults.mode.threshold)

    def _unknown(self, name: str) -> Response:
        known = ", ".join((*self.plugins, BASE))
        return error_response(404, f"there is no model '{name}'; models are {known}", code="model_not_found")

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, ChatRequest)

    async def _text(self, request: HttpRequest) -> Response:
        return await self._answer(request, TextRequest)

    async def _answer(self, http: HttpRequest, kind: type[Request]) -> Response:
        try:
            request = parse(kind, await _body(http))
            if request.model not in self.plugins and request.model != BASE:
                return self._unknown(request.model)
            ask = resolve(request, self.defaults)
            answering = Answering(self, request, ask)
        except UserError as error:
            return error_response(400, str(error))
        answers = Answers(request, ask.max_new_tokens)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(answering)
            # What is refused at once is refused by status in a stream too.
            awaited = answering.begun if request.stream else answering.task
            seconds = SIGN_SECONDS if request.stream else None
            async with _left(http) as left:
                await asyncio.wait((awaited, left), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if not awaited.done() and left.done():
                    return Response(status_code=499)  # nobody hears it
            if answering.task.done() and answering.task.exception() is not None:
                return error_of(answering.error())
            if request.stream:
                return EventStream(answering.events(answers), stack.pop_all())
            return JSONResponse(answers.whole(answering.progress, answering.task.result()))

    def run(
        self, request: Request, ask: Ask, on_progress: OnProgress, on_wait: OnWait, traffic: Traffic
    ) -> Coroutine[Any, Any, RemoteResult]:
        """Begins a generation.

        Raises:
            UserError: the request makes no sense.
        """
        is_base = request.model == BASE
        plugin = next(iter(self.plugins.values())) if is_base else self.plugins[request.model]
        setting: Setting | None = "base" if is_base else ask.mode.setting
        message = open_message(
            plugin, ask.prompts, ask.max_new_tokens, setting=setting, threshold=ask.mode.threshold,
            sampling=ask.sampling, seed=ask.seed, penalties=ask.penalties, stop=ask.stop, scored=ask.scored,
        )  # fmt: skip
        connection = dataclasses.replace(self.connection, delay=request.spa.network_ms / 1000)
        return generate(connection, plugin, message, on_progress, on_wait=on_wait, traffic=traffic)


class Answering:
    """A generation under way, of which only the newest progress waits to be told.

    Attributes:
        progress: all that is generated so far.
        traffic: all that has passed between cloud and device so far.
        task: runs it.
        begun: done with the first progress, or with the task.
    """

    def __init__(self, endpoint: Endpoint, request: Request, ask: Ask) -> None:
        self.progress, self.traffic = Progress(), Traffic()
        self._moved, self._awaited = asyncio.Event(), "waiting for the cloud"
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running, self._is_stopped = endpoint.running, False
        self.task: asyncio.Task[RemoteResult] = asyncio.create_task(
            self._run(endpoint.run(request, ask, self._take, self._wait, self.traffic))
        )
        self.task.add_done_callback(lambda _: self._move())

    async def _run(self, generation: Coroutine[Any, Any, RemoteResult]) -> RemoteResult:
        try:
            return await generation
        except asyncio.CancelledError:
            if self._is_stopped:
                raise Busy(STOPS) from None
            raise

    def stop(self) -> None:
        """Ends it with an error."""
        self._is_stopped = True
        self.task.cancel()

    def _take(self, progress: Progress) -> None:
        self.progress = progress
        self._move()

    def _wait(self, what: str) -> None:
        self._awaited = what

    def _move(self) -> None:
        self._moved.set()
        if not self.begun.done():
            self.begun.set_result(None)

    def error(self) -> BaseException:
        """Returns why it failed."""
        error = self.task.exception()
        assert error is not None
        return error

    async def events(self, answers: Answers) -> AsyncIterator[str]:
        """Yields server-sent events, and while there are none comments that say what is waited for; an error is the
        last, behind what was there."""
        for part in answers.begin():
            yield _event(part)
        while True:
            try:
                await asyncio.wait_for(self._moved.wait(), SIGN_SECONDS)
            except TimeoutError:
                yield f": {self._awaited}\n\n"
                continue
            self._moved.clear()
            is_done = self.task.done()
            for part in answers.parts(self.progress, self.traffic):
                yield _event(part)
            if is_done:
                break
        if self.task.exception() is not None:
            yield _event(_error_body(*_explain(self.error())))
            return
        for part in answers.end(self.progress, self.task.result()):
            yield _event(part)
        yield "data: [DONE]\n\n"

    async def __aenter__(self) -> "Answering":
        self._running.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running.discard(self)
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self.task


class EventStream(StreamingResponse):
    """Server-sent events, with what ends when they do, even where the client has left before the first."""

    def __init__(self, events: AsyncIterator[str], ends: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=STREAM)
        self._ends = ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        async with self._ends:
            await super().__call__(scope, receive, send)


POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'"
)
"""The page may load nothing from anywhere else, and no page from elsewhere may show it within its own."""
STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def error_response(status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> Response:
    """Makes an error of OpenAI's form."""
    return JSONResponse(_error_body(status, message, kind, code), status_code=status)


def error_of(error: BaseException) -> Response:
    """Makes the response to a generation that failed."""
    return error_response(*_explain(error))


def _explain(error: BaseException) -> tuple[int, str, str, str | None]:
    if isinstance(error, Busy):
        return 503, str(error), "api_error", "overloaded"
    if isinstance(error, Unfinished | Unserved | WireError):
        return 502, str(error), "api_error", "cloud_gone" if isinstance(error, Unfinished) else None
    if isinstance(error, UserError):
        return 400, str(error), "invalid_request_error", None
    log.error("a generation failed", exc_info=error)
    return 500, f"the device failed ({type(error).__name__})", "api_error", None


def _error_body(status: int, message: str, kind: str, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part)}\n\n"  # in ASCII: some clients end a line at U+2028


async def _body(request: HttpRequest) -> bytes:
    """Reads a request's body.

    Raises:
        UserError: it is too long, or has not come.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise UserError(f"the request has more than {MAX_BODY:,} bytes")
    except (ClientDisconnect, TimeoutError) as error:
        raise UserError("the request has not come whole") from error
    return bytes(body)


@contextlib.asynccontextmanager
async def _left(request: HttpRequest) -> AsyncIterator[asyncio.Task[Any]]:
    """Gives a task that ends when the client has left."""

    async def receive() -> None:
        await request.receive()

    task = asyncio.create_task(receive())
    try:
        yield task
    finally:
        task.cancel()


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(error.status_code, error.detail)
    response.headers.update(error.headers or {})
    return response


async def _server_error(_: HttpRequest, error: Exception) -> Response:
    return error_response(500, f"the device failed ({type(error).__name__})", "api_error")
