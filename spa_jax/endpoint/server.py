"""Serves an endpoint over HTTP, and finds the plugins that it serves."""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path, PurePath

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from spa_jax.endpoint.app import BASE, Endpoint
from spa_jax.errors import UserError
from spa_jax.split.grpc_channel import is_loopback
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.plugin import Plugin, load_plugin

LOCAL = ["localhost", "127.0.0.1", "[::1]"]
"""Names under which a browser may reach a server on loopback: another site's name that leads there is refused."""


DRAIN = 2.0
"""Seconds that answers under way have to end after a signal."""


class Server(uvicorn.Server):
    """A server that, when it is to stop, ends what has not ended after a while."""

    def __init__(self, endpoint: Endpoint, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._endpoint = endpoint

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for the answers under way, and ends those that take longer."""
        asyncio.get_running_loop().call_later(DRAIN, self._endpoint.stop)
        await super().shutdown(sockets)


def load_plugins(names: Sequence[str]) -> dict[str, Plugin]:
    """Loads plugins, by the names of their models.

    Args:
        names: of directories or on the hub, each alone or behind its model's name and `=`.

    Raises:
        UserError: one cannot be read, or two models have one name.
    """
    found: dict[str, Plugin] = {}
    for each in names:
        name, place = ("", each) if Path(each).is_dir() else _split_name(each)
        name = name or model_name(place)
        if name in found or name == BASE:
            raise UserError(f"two models would be called '{name}': name one with --plugin=NAME={place}")
        found[name] = load_plugin(plugin_directory(place))
    return found


def _split_name(named: str) -> tuple[str, str]:
    name, sign, place = named.partition("=")
    return (name, place) if sign else ("", named)


def model_name(place: str) -> str:
    """Names the model of a plugin: of `runs/mine/plugin`, `mine`."""
    parts = [part for part in PurePath(place).parts if part not in ("plugin", "/", ".", "..")]
    return parts[-1] if parts else "plugin"


def serve(endpoint: Endpoint, listener: socket.socket) -> None:
    """Serves until a signal."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    app = endpoint.app()
    if is_loopback(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, shown])
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=int(DRAIN) + 3
    )
    print(f"serving OpenAI's API at http://{shown}:{port}/v1, and a page at http://{shown}:{port}/", flush=True)
    asyncio.run(Server(endpoint, config).serve(sockets=[listener]))
