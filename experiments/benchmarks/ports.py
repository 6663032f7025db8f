"""Ports of this machine for the processes of a benchmark."""

import socket


def free_port() -> int:
    """Finds a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
