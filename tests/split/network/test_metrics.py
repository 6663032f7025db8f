"""Whoever reads the metrics slowly, or asks for them and goes, keeps them from nobody."""

import contextlib
import socket
import urllib.request

import pytest

from spa_jax.split import metrics
from spa_jax.split.grpc_channel import bind


@pytest.fixture
def port():
    with bind("127.0.0.1:0") as listener:
        free = listener.getsockname()[1]
    metrics.serve("127.0.0.1", free)
    return free


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return answer.read().decode()


@pytest.fixture
def slow_readers(port):
    """More than there is room for, each of which has begun to ask."""
    with contextlib.ExitStack() as stack:
        readers = []
        for _ in range(metrics.MAX_READERS + 3):
            reader = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            reader.sendall(b"GET /metrics HTTP/1.1\r\n")
            readers.append(reader)
        yield readers


def test_slow_readers_keep_the_metrics_from_nobody(port, slow_readers, monkeypatch, capfd):
    monkeypatch.setattr(metrics, "SLOWEST_READER", 600)
    assert "spa_sessions" in scrape(port)
    for reader in slow_readers[:4]:  # the oldest have made room, also for the scrape
        assert reader.recv(100) == b""
    slow_readers[-1].sendall(b"\r\n")
    assert slow_readers[-1].recv(8) == b"HTTP/1.0"
    assert capfd.readouterr().err == ""


def test_a_reader_has_so_much_time_and_no_more(port, monkeypatch, capfd):
    monkeypatch.setattr(metrics, "SLOWEST_READER", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as reader:
        reader.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert reader.recv(100) == b""
    assert capfd.readouterr().err == ""
