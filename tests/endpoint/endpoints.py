"""A cloud and the endpoint of a device in this process, each with an event loop of its own."""

import asyncio
import contextlib
import threading

import uvicorn

from spa_jax.endpoint.listener import listen
from spa_jax.endpoint.server import Server
from spa_jax.split.grpc_channel import ServerSecurity
from spa_jax.split.server import Limits, serving

NEW = 24


def shown_at_questions(tokens):
    """Counts for every token that the device is asked for, of tokens as (text, source), those before it that have a
    text by then: a part of a character waits for the rest."""
    counts = [index for index, (_, source) in enumerate(tokens) if source == "device"]
    return [next((shown for shown in range(count, 0, -1) if tokens[shown - 1][0]), 0) for count in counts]


@contextlib.contextmanager
def in_thread(start):
    """Runs the coroutine `start(ready, stop)`, which calls `ready(value)` and ends when `stop` is set; gives the value,
    and a function that stops it."""
    found, is_ready, loops = [], threading.Event(), []

    async def main():
        loops.append((asyncio.get_running_loop(), stop := asyncio.Event()))

        def ready(value):
            found.append(value)
            is_ready.set()

        try:
            await start(ready, stop)
        finally:
            is_ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert is_ready.wait(60)

    def end():
        loop, stop = loops[0]
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join(30)

    try:
        yield found[0], end
    finally:
        end()


def cloud_in_thread(cloud, limits=None):
    """Generations of who has left end because of that, and not since they are abandoned."""

    async def start(ready, stop):
        async with serving(cloud, "127.0.0.1:0", limits or Limits(deadline=30, abandoned=600), ServerSecurity()) as (
            server,
            port,
        ):
            ready((port, server))
            await stop.wait()

    return in_thread(start)


def endpoint_in_thread(endpoint):
    async def start(ready, stop):
        listener = listen("127.0.0.1:0", has_key=bool(endpoint.key))
        config = uvicorn.Config(endpoint.app(), log_config=None, access_log=False, lifespan="off")
        server = Server(endpoint, config)
        serving_it = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        ready(f"http://127.0.0.1:{listener.getsockname()[1]}")
        await stop.wait()
        server.should_exit = True
        await serving_it

    return in_thread(start)
