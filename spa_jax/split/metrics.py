"""The Prometheus metrics of a cloud; neither prompts nor activations are among them."""

import contextlib
import functools
import socket
import socketserver
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import jax
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spa_jax.engine.engine import Engine
from spa_jax.errors import UserError
from spa_jax.split.admission import Admission

REGISTRY = CollectorRegistry()
"""Ours alone, without what libraries count of themselves."""
_counter, _histogram = functools.partial(Counter, registry=REGISTRY), functools.partial(Histogram, registry=REGISTRY)
SESSIONS = Gauge("spa_sessions", "Generations under way.", registry=REGISTRY)
TOKENS = _counter("spa_tokens", "New tokens.")
EXCHANGES = _counter("spa_exchanges", "Questions asked of devices.")
MISSED = _counter("spa_deadlines_missed", "Questions without an answer in time.")
DEGRADED = _counter("spa_degraded_tokens", "Tokens chosen without an answer that was wanted.")
UNCORRECTED_PROMPTS = _counter("spa_uncorrected_prompts", "Prompts not corrected for want of an answer.")
DROPPED = _counter("spa_dropped_messages", "Messages that came late, twice, or made no sense.")
BYTES_DOWN = _counter("spa_bytes_down", "Bytes sent to devices.")
BYTES_UP = _counter("spa_bytes_up", "Bytes received from devices.")
COMPILED = _counter("spa_compiled_programs", "Programs compiled, or read from disk.")
COMPILE_SECONDS = _counter("spa_compile_seconds", "Seconds that this took.")
SECONDS_IN_QUEUE = _histogram("spa_seconds_in_queue", "From a request to the beginning of its generation.")
SECONDS_TO_FIRST_TOKEN = _histogram("spa_seconds_to_first_token", "From opening, the prompt's run included.")
SECONDS_BETWEEN_TOKENS = _histogram("spa_seconds_between_tokens", "From a generation's tokens to its next ones.")
SECONDS_PER_EXCHANGE = _histogram("spa_seconds_per_exchange", "From a question to its answer, or to the deadline.")
SECONDS_PER_TOKEN = _histogram("spa_seconds_per_token", "Of a generation, from its opening to its end.")
SLOWEST_READER = 5.0
"""Seconds that one who reads metrics may take."""
MAX_READERS = 16
"""Readers at once; one more ends the oldest."""


class _EngineMetrics(Collector):
    """Counts of the engine and of the queue in front of it, read when somebody asks."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine, self._admission = engine, admission

    def collect(self) -> Iterable[Metric]:
        engine, tally = self._engine, self._engine.tally
        gauges: dict[str, tuple[str, float]] = {
            "spa_queue": ("Generations that wait for room.", self._admission.waiting),
            "spa_cache_slots": ("Slots that the cache has now; it grows.", engine.slots.size),
            "spa_cache_slots_taken": ("Slots of generations and of kept prefixes.", engine.slots.taken),
        }
        counters: dict[str, tuple[str, float]] = {
            "spa_prompt_seconds": ("Seconds of running prompts.", tally.prompt_seconds),
            "spa_prompt_tokens": ("Tokens of prompts that were run, padding included.", tally.prompt_tokens),
            "spa_prefix_tokens": ("Tokens of prompts that others had run.", engine.prefixes.reused),
            "spa_step_seconds": ("Seconds of steps that add tokens.", tally.step_seconds),
            "spa_steps": ("Steps.", tally.steps),
            "spa_step_rows": ("Hypotheses of these steps; by spa_steps the occupancy of a batch.", tally.rows),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value)
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(name, help_text, value)


@contextlib.contextmanager
def watching(engine: Engine, admission: Admission) -> Iterator[None]:
    """Counts what these do among the metrics."""
    collector = _EngineMetrics(engine, admission)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each reader, however slowly some of them ask or read."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._limits: dict[socket.socket, threading.Timer] = {}  # of each reader, the oldest first
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins to answer a reader."""
        for oldest in list(self._limits)[: 1 - MAX_READERS]:
            self._hang_up(oldest)
        limit = self._limits[request] = threading.Timer(SLOWEST_READER, self._hang_up, (request,))
        limit.daemon = True
        limit.start()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Ends with a reader."""
        self._forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of readers that are gone or were too slow."""

    def _hang_up(self, request: socket.socket) -> None:
        self._forget(request)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: socket.socket) -> None:
        limit = self._limits.pop(request, None)
        if limit is not None:
            limit.cancel()


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of requests."""


def serve(host: str, port: int) -> None:
    """Serves the metrics over HTTP from threads, as long as this process lives.

    Raises:
        UserError: the address cannot be used.
    """
    jax.monitoring.register_event_duration_secs_listener(_count_compilation)
    app = prometheus_client.make_wsgi_app(REGISTRY)
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        own_family = type("Server", (_Server,), {"address_family": family})
        server: WSGIServer = make_server(host, port, app, own_family, _Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve metrics on {host}:{port}: {error}") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("/backend_compile_duration"):
        COMPILED.inc()
        COMPILE_SECONDS.inc(duration_secs)
