"""A conversation of a device whose cloud is started anew in its midst."""

import signal
import subprocess
import sys

import pytest

from spa_jax.split.cloud_process import cloud_process

pytestmark = pytest.mark.slow
HELD = """
import pathlib, runpy, sys, time
from spa_jax.split.device import Device
killed, receive, devices = pathlib.Path(sys.argv.pop(1)), Device.receive, []
def held(device, taps):
    if device not in devices:
        devices.append(device)
    while taps.step == 30 and len(devices) == 2 and not killed.exists():
        time.sleep(0.01)
    return receive(device, taps)
Device.receive = held
runpy.run_module("spa_jax.serve", run_name="__main__", alter_sys=True)
"""
"""A device that is in the midst of its second answer until the cloud is killed, as a file says."""


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
        sys.executable, "-c", HELD, f"{tmp_path}/killed", "device", f"--plugin={tmp_path}/plugin",
        f"--cloud=127.0.0.1:{port}", "--interactive", "--max_new_tokens=60", "--patience=600",
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
                (tmp_path / "killed").touch()
            with cloud_process(*cloud):
                read_until(device.stderr, "asking again")
                said = read_until(device.stdout, "consulted share")
                assert said.count("]\n60 tokens") == 1
        finally:
            device.stdin.close()
            assert device.wait(120) == 0
