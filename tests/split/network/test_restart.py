"""A conversation of a device whose cloud is started anew in its midst."""

import signal
import subprocess
import sys

import pytest

from spa_jax.split.cloud_process import cloud_process

pytestmark = pytest.mark.slow


@pytest.fixture
def port(free_port):
    return free_port()


def read_until(stream, text):
    """Reads a process's output as it comes, up to a text."""
    found = ""
    while text not in found:
        read = stream.read(1)
        assert read, found
        found += read
    return found


def test_a_cloud_that_is_started_anew_is_waited_for_and_asked_again(plugin, backbone, port, tmp_path):
    plugin.save(tmp_path / "plugin")
    command = [
        sys.executable, "-m", "spa_jax.serve", "device", f"--plugin={tmp_path}/plugin", f"--cloud=127.0.0.1:{port}",
        "--interactive", "--max_new_tokens=60",
    ]  # fmt: skip
    cloud = (backbone.name, f"--port={port}", "--deadline=30")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=0) as device:
        try:
            with cloud_process(*cloud) as first:
                device.stdin.write("What is thing 1?\n/new\nWhat is thing 2?\n")
                read_until(device.stdout, "consulted share")
                read_until(device.stdout, "> [")  # the second answer has begun
                first.process.send_signal(signal.SIGKILL)
                first.process.wait()
            with cloud_process(*cloud):
                read_until(device.stderr, "asking again")
                said = read_until(device.stdout, "consulted share")
                assert said.count("]\n60 tokens") == 1
        finally:
            device.stdin.close()
            assert device.wait(30) == 0
