"""Cloud and device over gRPC in processes of their own, with TLS and tokens."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from streams import tokens_of

from spa_jax.decoding.beam import Beams
from spa_jax.errors import UserError
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import check_address
from spa_jax.split.refusals import CloudGone
from spa_jax.split.request import open_message

ROOT = Path(__file__).parents[3]
PROMPTS, NEW = ["What is thing 1?", "And thing 2, if you please?"], 10


@pytest.fixture(scope="module")
def request_of(plugin):
    return lambda beams=None, new=NEW: open_message(plugin, PROMPTS, new, beams=beams)


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("cloud", "no address"),
        ("10.0.0.1:80", "in the clear"),
        ("example.com:443", "in the clear"),
        ("x:99999", "no address"),
    ],
)
def test_addresses_that_will_not_do(address, named):
    with pytest.raises(UserError, match=named):
        check_address(address, tls=False, insecure=False)


def test_loopback_and_tls_and_those_who_insist_may_pass():
    for address, tls, insecure in (
        ("127.0.0.1:1", False, False), ("localhost:1", False, False), ("[::1]:1", False, False),
        ("10.0.0.1:1", True, False), ("10.0.0.1:1", False, True),
    ):  # fmt: skip
        assert check_address(address, tls, insecure) == address


@pytest.fixture(scope="module")
def served(tiny_backbone_directory, tmp_path_factory):
    """A cloud in a process of its own, with TLS and tokens: (process, port, authorities, folder)."""
    trustme = pytest.importorskip("trustme")
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    (folder / "tokens").write_text("good-token\n")
    command = [
        sys.executable, "-m", "spa_jax.serve", "cloud", f"--backbone={tiny_backbone_directory}", "--port=0",
        f"--tls_cert={folder}/cert.pem", f"--tls_key={folder}/key.pem", f"--tokens={folder}/tokens", "--deadline=30",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    line = process.stdout.readline()
    assert line.startswith("serving on port "), (folder / "log").read_text()
    yield process, int(line.split()[-1]), folder / "ca.pem", folder
    process.kill()
    process.wait()


def connect(served, token="good-token", **changed):
    _, port, ca, _ = served
    connection = Connection(f"127.0.0.1:{port}", tls=True, ca=str(ca), token=token, patience=1.0)
    return dataclasses.replace(connection, **changed)


@pytest.mark.parametrize("beams", [None, Beams(3)], ids=["greedy", "beam 3"])
def test_two_processes_over_tls_say_what_one_says(beams, served, cloud, plugin, request_of):
    here = in_process(cloud, plugin, request_of(beams))
    there = asyncio.run(generate(connect(served), plugin, request_of(beams)))
    assert [g.tokens for g in there.generations] == [g.tokens for g in here.generations]
    assert there.degraded == 0


def test_a_device_without_its_token_is_refused(served, plugin, request_of):
    with pytest.raises(UserError, match="does not know this device"):
        asyncio.run(generate(connect(served, token="bad"), plugin, request_of()))


def test_a_cloud_with_a_certificate_nobody_signed_is_not_spoken_to(served, plugin, request_of, tmp_path):
    trustme = pytest.importorskip("trustme")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(UserError, match=r"is not to be trusted .*--ca"):
        asyncio.run(generate(connect(served, ca=str(tmp_path / "other.pem")), plugin, request_of()))


def test_a_cloud_that_is_killed_leaves_what_was_generated(served, plugin, request_of):
    process, *_, folder = served
    seen = []

    def watch(progress):
        seen.append(tokens_of(progress))
        if len(seen) == 3:
            process.send_signal(signal.SIGKILL)

    with pytest.raises(CloudGone, match="tokens had been generated") as gone:
        asyncio.run(generate(connect(served), plugin, request_of(), watch))
    assert [g.tokens for g in gone.value.generations] == seen[-1]
    assert all(seen[-1])
    logged = (folder / "log").read_text()
    assert "What is thing" not in logged
    assert '"message": "session ' in logged


@pytest.mark.parametrize("beams", [None, pytest.param(Beams(3), marks=pytest.mark.slow)], ids=["greedy", "beam 3"])
def test_a_backbone_over_two_devices_says_what_one_says(
    beams, tiny_backbone_directory, plugin, cloud, request_of, monkeypatch
):
    here = in_process(cloud, plugin, request_of(beams))
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4")
    with cloud_process(str(tiny_backbone_directory), "--tensor=2", "--deadline=60") as split:
        there = asyncio.run(generate(Connection(split.address), plugin, request_of(beams)))
    assert [g.tokens for g in there.generations] == [g.tokens for g in here.generations]
    assert there.degraded == 0
