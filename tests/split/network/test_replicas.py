"""Two clouds behind a real HAProxy, with the arguments and the configuration of the manifests for Kubernetes."""

import asyncio
import contextlib
import dataclasses
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from streams import Stream
from test_lines import Relay

from spa_jax.decoding.hypotheses import Generation
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import LocalCloud, cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.device import Device
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import PREFIX_HEADER
from spa_jax.split.messages_pb2 import Cancel, FromDevice, Open
from spa_jax.split.refusals import SessionLost
from spa_jax.split.request import PREFIX_TOKENS, open_message, prefix_digest

pytestmark = pytest.mark.slow
NEW, HOSTS = 10, ("127.0.0.2", "127.0.0.3")
MANIFESTS = [
    manifest
    for path in (Path(__file__).parents[3] / "experiments/cloud/kubernetes").glob("*.yaml")
    for manifest in yaml.safe_load_all(path.read_text())
]


def manifest(kind, name):
    (found,) = (each for each in MANIFESTS if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


CLOUD = manifest("Deployment", "spa-cloud")["spec"]["template"]["spec"]["containers"][0]
CONFIGURATION = manifest("ConfigMap", "spa-proxy")["data"]["haproxy.cfg"]


class NameServer(socketserver.ThreadingUDPServer):
    """Says that every name has these IPv4 addresses, as Kubernetes does of the replicas that are ready."""

    def __init__(self, addresses):
        super().__init__(("127.0.0.1", 0), self._Answer)
        self.addresses = list(addresses)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    class _Answer(socketserver.BaseRequestHandler):
        def handle(self):
            data, replies = self.request
            end = data.index(0, 12) + 5  # of the question, whose name is labels up to an empty one
            is_ipv4 = data[end - 4 : end] == b"\x00\x01\x00\x01"
            found = [socket.inet_aton(address) for address in self.server.addresses] if is_ipv4 else []
            header = data[:2] + b"\x81\x80" + struct.pack(">4H", 1, len(found), 0, 0)
            records = [b"\xc0\x0c" + struct.pack(">2HIH", 1, 1, 5, 4) + address for address in found]
            replies.sendto(header + data[12:end] + b"".join(records), self.client_address)


class Site(NamedTuple):
    """Two clouds with their logs and the ports of their metrics, the name server that knows them, and a proxy with its
    log."""

    clouds: list[LocalCloud]
    logs: list[Path]
    metrics: list[int]
    names: NameServer
    connection: Connection
    log: Path
    start_proxy: Callable[[], subprocess.Popen[bytes]]
    proxies: list[subprocess.Popen[bytes]]

    def stop_proxy(self):
        self.proxies[-1].terminate()
        self.proxies[-1].wait()

    def opened(self):
        """How many generations each cloud has begun."""
        return [len(re.findall(r"session [0-9a-f]{32} opened", log.read_text())) for log in self.logs]

    def num_ready(self):
        """How often the proxy has learnt of a replica."""
        return self.log.read_text().count("(resolves again)")

    def num_ended(self):
        """How many streams the proxy has seen end."""
        return self.log.read_text().count("/Generate HTTP")

    def replica_of(self, before):
        """The one that has begun a generation since it was `before`."""
        (changed,) = (replica for replica, (a, b) in enumerate(zip(before, self.opened())) if a != b)
        return changed


@pytest.fixture(scope="module")
def haproxy():
    """Its executable."""
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if found is None or sys.platform != "linux":
        pytest.skip("needs HAProxy (the package haproxy of Debian and others), and Linux, where all of 127/8 is here")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A certificate with its key and authority, and the tokens of devices."""
    trustme = pytest.importorskip("trustme")
    folder, authority = tmp_path_factory.mktemp("proxy"), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    (folder / "tokens.txt").write_text("good-token\nanother\n")
    return folder


@pytest.fixture(scope="module")
def site(haproxy, folder, tiny_backbone_directory):
    with contextlib.ExitStack() as stack:
        names, listener = stack.enter_context(NameServer(HOSTS)), stack.enter_context(listen())
        stack.callback(names.shutdown)
        with listen("0.0.0.0") as free:  # a port of all hosts
            port = free.getsockname()[1]
        clouds, logs, metrics = [], [], []
        for host in HOSTS:
            with listen() as free:
                metrics.append(free.getsockname()[1])
            logs.append(folder / f"{host}.log")
            here = [
                f"--tokens={folder}/tokens.txt",
                f"--host={host}",
                f"--port={port}",
                f"--metrics_port={metrics[-1]}",
            ]
            quick = [f"--backbone={tiny_backbone_directory}", "--warm=0", "--deadline=30", "--drain=0"]
            clouds.append(stack.enter_context(cloud_process("overridden", *CLOUD["args"], *here, *quick, log=logs[-1])))
        listens = f"fd@{listener.fileno()}"
        (folder / "haproxy.cfg").write_text(configuration(folder, listens, port, names.server_address[1]))
        log = stack.enter_context((folder / "haproxy.log").open("w"))
        command = [haproxy, "-W", "-db", "-f", str(folder / "haproxy.cfg")]

        def start_proxy():
            return subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=log, stderr=log)

        address = f"127.0.0.1:{listener.getsockname()[1]}"
        connection = Connection(address, tls=True, ca=f"{folder}/ca.pem", token="good-token")
        site = Site(clouds, logs, metrics, names, connection, folder / "haproxy.log", start_proxy, [start_proxy()])
        stack.callback(site.stop_proxy)
        yield site


def listen(host="127.0.0.1"):
    return socket.create_server((host, 0))


def configuration(folder, listen, port, names):
    """The manifest's configuration, with these files, listener, port of the clouds, and port of the name server."""
    found = replace_once(CONFIGURATION, "/etc/haproxy/tls", str(folder))
    found = replace_once(found, "bind :8470", f"bind {listen}")
    found = replace_once(found, ".local:8470", f".local:{port}")
    return replace_once(found, "parse-resolv-conf", f"nameserver here 127.0.0.1:{names}")


def replace_once(text, old, new):
    assert text.count(old) == 1
    return text.replace(old, new)


def test_haproxy_takes_the_configuration(haproxy, folder, tmp_path):
    (tmp_path / "haproxy.cfg").write_text(replace_once(CONFIGURATION, "/etc/haproxy/tls", str(folder)))
    done = subprocess.run([haproxy, "-c", "-f", str(tmp_path / "haproxy.cfg")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()


class Answer(NamedTuple):
    """A request, what it ought to generate, and the replica that its prefix belongs to."""

    request: Open
    generations: list[Generation]
    replica: int


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def metadata_of(answer):
    """What a device says of itself."""
    return [(PREFIX_HEADER, prefix_digest(answer.request)), ("authorization", "Bearer good-token")]


def request_of(plugin, prefix, end):
    return open_message(plugin, [[prefix] * PREFIX_TOKENS + list(end)], NEW)


@pytest.fixture
def answers(site, cloud, plugin):
    """Of six prefixes, each asked twice, with another one's generation between."""
    found = []
    for prefix in range(6):
        request, replicas = request_of(plugin, prefix, b"and one"), set()
        for each in (request, request_of(plugin, prefix, b"and another"), request):
            before, num_ended = site.opened(), site.num_ended()
            there = run(generate(site.connection, plugin, each))
            replicas.add(site.replica_of(before))
            while site.num_ended() == num_ended:  # until then it counts as this replica's load
                time.sleep(0.01)
        here = in_process(cloud, plugin, request)
        assert there.generations == here.generations
        (replica,) = replicas
        found.append(Answer(request, here.generations, replica))
    return found


@pytest.fixture
def slow_devices(answers, monkeypatch):
    """Devices that take a while for each answer, so that something may happen meanwhile."""
    receive = Device.receive

    def receive_slowly(self, taps):
        time.sleep(0.3)
        return receive(self, taps)

    monkeypatch.setattr(Device, "receive", receive_slowly)


def test_probes_and_autoscaler_find_what_they_ask_for(site):
    for host, replica, port in zip(HOSTS, site.clouds, site.metrics):
        with grpc.insecure_channel(f"{host}:{replica.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                service = CLOUD[probe]["grpc"].get("service", "")
                answer = health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with urllib.request.urlopen(f"http://{host}:{port}/metrics") as page:
            metrics = re.findall(r"^(\w+)", page.read().decode(), re.MULTILINE)
        scaled_by = manifest("HorizontalPodAutoscaler", "spa-cloud")["spec"]["metrics"]
        assert {each["pods"]["metric"]["name"] for each in scaled_by} <= set(metrics)


def test_a_prefix_has_one_replica_and_each_replica_has_some(answers):
    assert {answer.replica for answer in answers} == {0, 1}


def test_a_device_that_comes_back_finds_its_replica_where_its_prefix_is_not(site, plugin, answers, slow_devices):
    """It was sent elsewhere since its prefix's replica had more than its share; there is room when it comes back."""

    async def is_sent_elsewhere(answer):
        async with site.connection.open() as channel, Relay(int(site.connection.address.rpartition(":")[2])) as relay:
            other = Stream(channel, FromDevice(open=answer.request), metadata_of(answer))
            assert (await other.receive()).HasField("opened")
            before, connections = site.opened(), []

            def watch(progress):
                if not connections:
                    other.send(FromDevice(cancel=Cancel()))
                    asyncio.get_running_loop().call_later(1, relay.cut)
                connections.append(relay.connections)

            connection = dataclasses.replace(site.connection, address=relay.address)
            result = await generate(connection, plugin, answer.request, watch)
            assert connections[0] < connections[-1]
            assert result.generations == answer.generations
            return site.replica_of(before) != answer.replica

    one_of_each = [next(answer for answer in answers if answer.replica == replica) for replica in (0, 1)]
    assert any(run(is_sent_elsewhere(answer)) for answer in one_of_each)  # HAProxy rounds one's share up


def test_a_replica_that_is_not_ready_any_more_ends_what_it_has_begun(site, plugin, answers, slow_devices):
    answer, before, num_ready = answers[0], site.opened(), site.num_ready()

    async def scenario():
        generation = asyncio.create_task(generate(site.connection, plugin, answer.request))
        while site.opened() == before:
            await asyncio.sleep(0.1)
        assert site.replica_of(before) == answer.replica
        site.names.addresses.remove(HOSTS[answer.replica])
        async with site.connection.open() as channel:
            while site.opened()[1 - answer.replica] == before[1 - answer.replica]:
                stream = Stream(channel, FromDevice(open=answer.request), metadata_of(answer))
                assert (await stream.receive()).HasField("opened")
                stream.send(FromDevice(cancel=Cancel()))
                assert not generation.done()
        result = await generation
        site.names.addresses[:] = HOSTS
        while site.num_ready() == num_ready:
            await asyncio.sleep(0.1)
        return result

    result = run(scenario())
    assert result.generations == answer.generations
    assert result.degraded == 0


def test_another_proxy_finds_the_replica_of_a_session(site, plugin, answers, slow_devices):
    for answer in (next(answer for answer in answers if answer.replica == replica) for replica in (0, 1)):
        num_seen, before = 0, site.opened()

        def watch(progress):
            nonlocal num_seen
            num_seen += 1
            if num_seen == 3:
                site.stop_proxy()
                site.proxies.append(site.start_proxy())

        result = run(generate(site.connection, plugin, answer.request, watch))
        assert result.generations == answer.generations
        assert result.degraded == 0
        assert sum(site.opened()) == sum(before) + 1


def test_a_replica_is_killed(site, plugin, answers, slow_devices):
    """Its devices learn that their sessions are lost, and generate again at the other replica, whose own devices notice
    nothing."""
    victim = answers[0].replica
    of_each = [[answer for answer in answers if answer.replica == replica][:2] for replica in (victim, 1 - victim)]
    answers = [answer for pair in zip(*of_each) for answer in pair]  # by turns, so that none is sent elsewhere
    before, seen = site.opened(), [0] * len(answers)

    async def run_device(number):
        def watch(progress):
            seen[number] = len(progress.generated[0].tokens)

        try:
            return await generate(site.connection, plugin, answers[number].request, watch)
        except SessionLost as lost:
            return lost

    async def scenario():
        devices = []
        for number in range(len(answers)):
            devices.append(asyncio.create_task(run_device(number)))
            while sum(site.opened()) - sum(before) < len(devices):
                await asyncio.sleep(0.01)
        while not all(seen):
            await asyncio.sleep(0.01)
        site.clouds[victim].process.send_signal(signal.SIGKILL)
        return await asyncio.gather(*devices)

    results = run(scenario())
    assert [b - a for a, b in zip(before, site.opened())] == [2, 2]
    for num_seen, answer, result in zip(seen, answers, results):
        if answer.replica == victim:
            assert isinstance(result, SessionLost)
            assert "(unknown-session)" in str(result)
            (lost,), (whole,) = result.generations, answer.generations
            assert 0 < num_seen == len(lost.tokens) < NEW
            assert lost.tokens == whole.tokens[:num_seen]
            result = run(generate(site.connection, plugin, answer.request))
        assert result.generations == answer.generations
        assert result.degraded == 0
