"""A cloud, plugins, and the endpoint of their device."""

import sys
import threading
from pathlib import Path

import pytest
from endpoints import NEW, cloud_in_thread, endpoint_in_thread

sys.path.append(str(Path(__file__).parents[1] / "split"))

from tiny_split import random_plugin

from spa_jax.endpoint.app import Endpoint
from spa_jax.endpoint.requests import Defaults
from spa_jax.split.connection import Connection
from spa_jax.split.device import Device
from spa_jax.split.session import Cloud
from spa_jax.weights.registry import load_backbone


@pytest.fixture(scope="session")
def backbone(tiny_backbone_directory):
    return load_backbone(str(tiny_backbone_directory))


@pytest.fixture(scope="session")
def cloud(backbone):
    """Of these tests alone, for what is computed in one process beside the server."""
    return Cloud(backbone)


@pytest.fixture(scope="session")
def plugins(backbone):
    return {"mine": random_plugin(backbone, "spa"), "inner": random_plugin(backbone, "s1", entry=2, edits="all")}


@pytest.fixture
def replies(monkeypatch):
    """A semaphore that the device acquires before it answers a question about a token."""
    replies, receive = threading.Semaphore(0), Device.receive

    def held(device, taps):
        assert taps.prompt or replies.acquire(timeout=60)
        return receive(device, taps)

    monkeypatch.setattr(Device, "receive", held)
    return replies


@pytest.fixture(scope="session")
def server(backbone):
    with cloud_in_thread(Cloud(backbone)) as ((port, server), _):
        yield port, server


@pytest.fixture(scope="session")
def url(server, plugins):
    """Of the endpoint."""
    connection = Connection(f"127.0.0.1:{server[0]}")
    with endpoint_in_thread(Endpoint(plugins, connection, Defaults(max_new_tokens=NEW))) as (url, _):
        yield url
