"""gRPC's health service, for any number of strangers: what it holds for them is bounded, and they hold up nobody.

The one that comes with gRPC keeps every stream, and tells those that watch one after another, so that one that does not
read keeps the cloud from stopping."""

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2

from spa_jax.split import wire
from spa_jax.split.grpc_channel import SERVICE
from spa_jax.split.streams import Line, Room, address_of

MAX_CHECKS, MAX_WATCHERS = 64, 32
"""Streams of either kind at once."""
NOTHING_CAME = (TimeoutError, StopAsyncIteration, wire.WireError)
Response = health_pb2.HealthCheckResponse


class Health:
    """The status of a cloud: of its process, under the empty name, and of its service."""

    def __init__(self, seconds: float) -> None:
        """Gives a stream so many seconds to say what it asks for, and to take what it is told."""
        self._seconds = seconds
        self._status = {"": Response.SERVING, SERVICE: Response.SERVING}
        self._changed = asyncio.Event()
        self.checks, self.watchers = Room(MAX_CHECKS), Room(MAX_WATCHERS)

    def set(self, is_serving: bool, *services: str) -> None:
        """Sets the status of some services, and tells those that watch."""
        for service in services:
            self._status[service] = Response.SERVING if is_serving else Response.NOT_SERVING
        self._changed.set()
        self._changed.clear()

    def stop(self) -> None:
        """Says of everything that it does not serve."""
        self.set(False, *self._status)

    def handler(self) -> grpc.GenericRpcHandler:
        """Makes the handler of its methods: as streams, which begin before their message has come, so that those of
        which none comes are counted too."""
        methods = {
            "Check": grpc.stream_stream_rpc_method_handler(self._check),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)

    async def _check(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        line = Line(context)
        try:
            async with self.checks.stay(address_of(context.peer()), self._seconds):
                service = wire.parse(health_pb2.HealthCheckRequest, await anext(requests)).service
                if service not in self._status:
                    await line.end(grpc.StatusCode.NOT_FOUND, "there is no such service")
                await line.write(Response(status=self._status[service]).SerializeToString(), self._seconds)
        except NOTHING_CAME:
            await line.end(grpc.StatusCode.INVALID_ARGUMENT, "no request came")

    async def _watch(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        line, told = Line(context), None
        try:
            async with self.watchers.stay(address_of(context.peer()), None):
                async with asyncio.timeout(self._seconds):
                    service = wire.parse(health_pb2.HealthCheckRequest, await anext(requests)).service
                while True:
                    status = self._status.get(service, Response.SERVICE_UNKNOWN)
                    if status != told:
                        await line.write(Response(status=status).SerializeToString(), self._seconds)
                        told = status
                    else:
                        await self._changed.wait()
        except NOTHING_CAME:
            await line.end(grpc.StatusCode.RESOURCE_EXHAUSTED, "no request came, or others watch too")
