"""Lines that break under a device, and devices that go away: what the client itself does about it."""

import asyncio
import contextlib
import threading
import time

import grpc
import pytest
from streams import Stream, connected, metric, run
from tiny_split import random_plugin

from spa_jax.errors import UserError
from spa_jax.split import grpc_channel, opening, server
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.device import Device
from spa_jax.split.generation import generate as in_process
from spa_jax.split.messages_pb2 import FromDevice
from spa_jax.split.refusals import CloudGone
from spa_jax.split.request import open_message
from spa_jax.split.server import Limits
from spa_jax.split.server_session import ServerSession

PROMPTS, NEW = ["What is thing 1? " * 3, "And thing 2, if you please?"], 8


class Relay:
    """A line between a device and a port that can be cut."""

    def __init__(self, port):
        self.connections, self._port, self._writers = 0, port, []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.cut()

    def cut(self):
        """Whoever speaks over it now is cut off."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _carry(self, reader, writer):
        self.connections += 1
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, to_writer]
        await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))

    async def _pump(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.mark.parametrize(
    ("kind", "entry", "edits"),
    [("tokenwise", "head", "targets"), ("transformer", "head", "targets"), ("transformer", 0, "all")],
)
def test_a_line_that_breaks_loses_nothing_and_no_two_programs_of_a_device_run_at_once(
    kind, entry, edits, cloud, backbone, monkeypatch
):
    """The line breaks while the side network runs; the device comes back, and is asked the same again meanwhile. With
    `all`, the third question is about a prompt."""
    monkeypatch.setattr(opening, "CHUNK_POSITIONS", 20)
    plugin = random_plugin(backbone, "s1", kind=kind, entry=entry, edits=edits)
    request = open_message(plugin, PROMPTS, NEW)
    here = in_process(cloud, plugin, request)
    receive, inside, at_once, calls = Device.receive, threading.Semaphore(1), [], []

    async def scenario(port):
        loop = asyncio.get_running_loop()
        async with Relay(port) as relay:

            def slow(self, taps):
                at_once.append(not inside.acquire(blocking=False))
                calls.append(taps.step)
                if calls.count(3) == 1 and taps.step == 3:
                    before = relay.connections
                    loop.call_soon_threadsafe(relay.cut)
                    while relay.connections == before:
                        time.sleep(0.01)
                    time.sleep(0.5)
                try:
                    return receive(self, taps)
                finally:
                    inside.release()

            monkeypatch.setattr(Device, "receive", slow)
            return await generate(Connection(relay.address), plugin, request), relay.connections

    there, connections = run(cloud, scenario)
    assert connections >= 2
    assert not any(at_once)
    assert there.generations == here.generations
    assert (there.degraded, there.uncorrected_prompts) == (0, 0)
    assert (there.traffic.opening_exchanges > 3) == (edits == "all")


def test_a_connection_that_grows_old_is_closed_and_only_who_reads_comes_back(cloud, plugin, monkeypatch):
    """Nothing else would end the stream of a device that lives and never reads."""
    old = (("grpc.max_connection_age_ms", 1000), ("grpc.max_connection_age_grace_ms", 100))
    assert not {name for name, _ in old} - dict(grpc_channel.CLOUD_OPTIONS).keys()
    monkeypatch.setattr(server, "CLOUD_OPTIONS", tuple((dict(grpc_channel.CLOUD_OPTIONS) | dict(old)).items()))
    request = open_message(plugin, PROMPTS, NEW)
    here = in_process(cloud, plugin, request)
    receive, attach, sessions = Device.receive, ServerSession.attach, []

    def attached(self):
        sessions.append(self)
        return attach(self)

    monkeypatch.setattr(ServerSession, "attach", attached)

    async def scenario(port):
        async with connected(port) as channel, Relay(port) as relay:

            def slow(self, taps):
                """Takes longer for the first question than a connection lasts."""
                latest = time.monotonic() + 60
                while relay.connections < 2:
                    assert time.monotonic() < latest
                    time.sleep(0.01)
                return receive(self, taps)

            monkeypatch.setattr(Device, "receive", slow)
            deaf = Stream(channel, FromDevice(open=request))
            while not sessions:
                await asyncio.sleep(0.01)
            there = await generate(Connection(relay.address, patience=600), plugin, request)
            while sessions[0].outbox is not None:
                await asyncio.sleep(0.01)
            is_running = sessions[0].is_running
            deaf.call.cancel()
            return there, is_running, relay.connections

    there, is_running, connections = run(cloud, scenario, Limits(deadline=600, abandoned=600))
    assert connections >= 2
    assert is_running, "the session of the deaf device was over, and with it the stream"
    assert there.generations == here.generations


@pytest.mark.parametrize("how", ["interrupted", "an error of its own"])
def test_what_ends_the_device_ends_the_work_of_the_cloud(how, cloud, plugin, monkeypatch):
    request = open_message(plugin, PROMPTS, NEW)

    async def scenario(port):
        before, task = metric("spa_sessions"), None

        def watch(progress):
            assert metric("spa_sessions") == before + 1
            if how == "interrupted":
                task.cancel()
            else:
                raise OverflowError("mine")

        task = asyncio.create_task(generate(Connection(f"127.0.0.1:{port}"), plugin, request, watch))
        with pytest.raises(asyncio.CancelledError if how == "interrupted" else OverflowError):
            await task
        while metric("spa_sessions") > before:
            await asyncio.sleep(0.01)

    run(cloud, scenario, Limits(deadline=600))


def test_an_error_of_the_side_network_is_the_users_to_see(cloud, plugin, monkeypatch):
    def broken(self, taps):
        raise MemoryError("no room for this")

    monkeypatch.setattr(Device, "receive", broken)
    with pytest.raises(MemoryError, match="no room for this"):
        run(cloud, lambda port: generate(Connection(f"127.0.0.1:{port}"), plugin, open_message(plugin, PROMPTS, NEW)))


def test_something_before_the_cloud_without_a_free_stream_is_overloaded(plugin):
    async def busy(requests, context):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no stream is free")

    async def main():
        proxy = grpc.aio.server()
        handlers = {grpc_channel.METHOD: grpc.stream_stream_rpc_method_handler(busy)}
        proxy.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(grpc_channel.SERVICE, handlers),))
        port = proxy.add_insecure_port("127.0.0.1:0")
        await proxy.start()
        try:
            await generate(Connection(f"127.0.0.1:{port}"), plugin, open_message(plugin, PROMPTS, 1))
        finally:
            await proxy.stop(0)

    with pytest.raises(UserError, match=r"the cloud refuses \(overloaded\): no stream is free"):
        asyncio.run(main())


def test_a_cloud_that_does_not_speak_tls_is_told_from_one_that_is_gone(cloud, plugin):
    with pytest.raises(UserError, match="does not speak TLS") as refused:
        run(
            cloud,
            lambda port: generate(Connection(f"127.0.0.1:{port}", tls=True), plugin, open_message(plugin, PROMPTS, 1)),
        )
    assert not isinstance(refused.value, CloudGone)
