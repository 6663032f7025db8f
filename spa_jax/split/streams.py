"""Streams of whoever can reach a cloud: how many there may be of a kind, and how long one may take to listen."""

import asyncio
import contextlib
import ipaddress
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import grpc


class Room:
    """Room for streams of one kind. One too many ends the oldest of whoever has most."""

    def __init__(self, most: int, most_of_one: int | None = None) -> None:
        """Holds so many streams, and so many of one owner."""
        self._most, self._most_of_one = most, most if most_of_one is None else most_of_one
        self._held: dict[str, dict[asyncio.Timeout, None]] = {}  # the oldest of an owner first

    @property
    def taken(self) -> int:
        """Streams that are here."""
        return sum(map(len, self._held.values()))

    @contextlib.asynccontextmanager
    async def stay(self, owner: str, seconds: float | None) -> AsyncIterator[None]:
        """Holds the current task's stream while this context lasts, at most for these seconds.

        Raises:
            TimeoutError: the time is over, or another one needs the room.
        """
        async with asyncio.timeout(seconds) as limit:
            if len(self._held.get(owner, ())) >= self._most_of_one:
                self._end_oldest(owner)
            self._held.setdefault(owner, {})[limit] = None
            if self.taken > self._most:
                self._end_oldest(max(self._held, key=lambda each: len(self._held[each])))
            try:
                yield
            finally:
                self._remove(owner, limit)

    def _end_oldest(self, owner: str) -> None:
        limit = next(iter(self._held[owner]))
        self._remove(owner, limit)
        limit.reschedule(0)

    def _remove(self, owner: str, limit: asyncio.Timeout) -> None:
        held = self._held.get(owner, {})
        held.pop(limit, None)
        if not held:
            self._held.pop(owner, None)


class Line:
    """What a stream is told, as long as its other end listens."""

    def __init__(self, context: Any) -> None:
        """Takes a stream's `grpc.aio.ServicerContext`, of which gRPC's own is none by type."""
        self._context, self._is_writing = context, False

    async def write(self, data: bytes, seconds: float) -> None:
        """Sends a message.

        Raises:
            TimeoutError: it was not taken within these seconds.
        """
        self._is_writing = True
        async with asyncio.timeout(seconds):
            await self._context.write(data)
        self._is_writing = False

    async def end(self, code: grpc.StatusCode, reason: str) -> None:
        """Ends the stream, without a word where it has not taken what it was sent before: gRPC can say nothing behind
        that, and lets go of it with the connection."""
        if self._is_writing:
            raise asyncio.CancelledError
        await self._context.abort(code, reason)


def address_of(peer: str) -> str:
    """Names where a stream comes from, by gRPC's name of its other end: without the port, and of IPv6 the network of 64
    bits, all of which one host may have. A server of both families names IPv4's addresses as IPv6's (RFC 4291)."""
    host = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
