"""What an endpoint holds out against: clients that leave at every moment, other hosts, flags and refusals."""

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
import urllib.parse

import httpx2
import openai
import pytest
import uvicorn
from endpoints import endpoint_in_thread
from starlette.testclient import TestClient
from test_openai_client import MESSAGES, QUESTION

from spa_jax.endpoint.app import Endpoint, EventStream, error_of
from spa_jax.endpoint.listener import listen
from spa_jax.endpoint.requests import Defaults
from spa_jax.endpoint.server import load_plugins, serve
from spa_jax.errors import UserError
from spa_jax.split.client import DeviceClient, generate
from spa_jax.split.connection import Connection
from spa_jax.split.device import Device
from spa_jax.split.grpc_channel import check_free
from spa_jax.split.messages_pb2 import FromCloud, Refusal
from spa_jax.split.request import open_message
from spa_jax.terminal import Mode

FOREIGN = (
    "evil.example", "evil.example:8471", "localhost.evil.example", "127.0.0.1.evil.example", "",
    "localhost@evil.example",
)  # fmt: skip
LEAVES = httpx2.Timeout(60, read=0.5)
"""Timeouts of a client that leaves when it has not been answered for half a second."""


class Served:
    """A server that ends at once."""

    def __init__(self, *_):
        pass

    async def serve(self, sockets):
        pass


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_tells_those_it_is_answering(stream, server, plugins, monkeypatch, caplog):
    monkeypatch.setattr("spa_jax.endpoint.server.DRAIN", 0.2)
    body = {"model": "inner", "messages": MESSAGES, "stream": stream, "max_tokens": 60, "spa": {"network_ms": 300}}
    endpoint = Endpoint(plugins, Connection(f"127.0.0.1:{server[0]}"))
    with concurrent.futures.ThreadPoolExecutor() as pool, endpoint_in_thread(endpoint) as (url, end):
        asked = pool.submit(httpx2.post, f"{url}/v1/chat/completions", json=body, timeout=600)
        latest = time.monotonic() + 120
        while not any(each.begun.done() for each in list(endpoint.running)):
            assert time.monotonic() < latest
            time.sleep(0.02)
        end()
        response = asked.result()
    assert response.status_code == (200 if stream else 503)
    error = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))["error"]
    assert error["message"] == "the device stops"
    assert not endpoint.running
    assert "Traceback" not in caplog.text


def test_a_stream_that_waits_shows_signs_of_life_that_clients_skip(url, server, monkeypatch):
    engine, are_seen, lines = server[1]._cloud.engine, threading.Event(), []
    turn = engine.turn

    def held():
        assert are_seen.wait(60)
        return turn()

    monkeypatch.setattr(engine, "turn", held)
    monkeypatch.setattr("spa_jax.endpoint.app.SIGN_SECONDS", 0.05)
    monkeypatch.setattr("spa_jax.split.waiting.TELL_EVERY", 0.02)
    body = {"model": "inner", "messages": MESSAGES, "stream": True, "max_tokens": 3, "spa": {"network_ms": 300}}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in filter(None, response.iter_lines()):
            lines.append(line)
            signs = [line for line in lines if line.startswith(":")]
            if len(signs) >= 3 and signs[-1].startswith(": the cloud works, no token yet: "):
                are_seen.set()
    kinds = [line.partition(" ")[0] for line in lines]
    first = next(at for at, line in enumerate(lines) if line.startswith("data:") and '"spa"' in line)
    assert kinds[:first].count(":") >= 3
    assert any(line.startswith(": the cloud works, no token yet: ") for line in lines[:first])
    assert lines[-1] == "data: [DONE]"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    parts = list(
        client.chat.completions.create(**{k: v for k, v in body.items() if k != "spa"}, extra_body={"spa": body["spa"]})
    )
    said = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [part.choices[0].delta.content for part in parts] == [
        part["choices"][0]["delta"].get("content") for part in said
    ]


def test_a_request_that_does_not_come_whole_is_not_waited_for(url, monkeypatch):
    monkeypatch.setattr("spa_jax.endpoint.app.BODY_SECONDS", 0.3)
    address = urllib.parse.urlsplit(url)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode())
        answer = ""
        while not answer.endswith("}"):
            part = connection.recv(2**16)
            assert part, answer
            answer += part.decode()
    assert " 400 " in answer.splitlines()[0]
    assert "has not come whole" in answer


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_first_token_ends_the_generation(stream, url, server):
    sessions = server[1]._sessions._by_name
    body = {"model": "inner", "messages": MESSAGES, "stream": stream, "spa": {"network_ms": 20_000}}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=LEAVES)
    latest = time.monotonic() + 60
    while any(session.is_running for session in list(sessions.values())):
        assert time.monotonic() < latest
        time.sleep(0.02)


def test_a_stream_whose_client_has_left_before_its_first_event_ends_what_it_has_begun():
    async def receive():
        return {"type": "http.disconnect"}

    async def send(_):
        pass

    async def events():
        yield ""

    async def respond():
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(ended.append, True)
            response = EventStream(events(), stack.pop_all())
        assert not ended
        await response({"type": "http"}, receive, send)

    ended = []
    asyncio.run(respond())
    assert ended


def test_a_device_that_compiles_for_one_who_has_left_holds_up_nobody(url, monkeypatch):
    began, is_over, receive = threading.Event(), threading.Event(), Device.receive

    def slow(self, taps):
        began.set()
        assert is_over.wait(600)
        return receive(self, taps)

    monkeypatch.setattr(Device, "receive", slow)
    try:
        while not began.is_set():
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{url}/v1/chat/completions", json={"model": "inner", "messages": MESSAGES}, timeout=LEAVES)
        assert httpx2.get(f"{url}/health", timeout=30).status_code == 200
    finally:
        is_over.set()


@pytest.mark.parametrize("new", [4, 10_000], ids=["answered", "refused"])
def test_a_generation_leaves_no_task_behind(new, server, plugins):
    async def ask():
        request = open_message(plugins["mine"], [QUESTION], new)
        with contextlib.suppress(UserError):
            await generate(Connection(f"127.0.0.1:{server[0]}"), plugins["mine"], request)
        latest = time.monotonic() + 10
        while left() and time.monotonic() < latest:
            await asyncio.sleep(0.01)
        return left()

    def left():
        return [task for task in asyncio.all_tasks() if "_consume_request_iterator" in repr(task)]

    assert not asyncio.run(ask())


@pytest.mark.parametrize(
    ("kind", "status"), [("refused", 400), ("overloaded", 503), ("failed", 502), ("unknown-token", 502)]
)
def test_whose_fault_a_refusal_is_says_its_status(kind, status, plugins):
    request = open_message(plugins["mine"], ["(overloaded) is busy"], 4)
    programs = concurrent.futures.ThreadPoolExecutor(1)
    device = DeviceClient(plugins["mine"], request, None, None, programs, Connection("127.0.0.1:1"))
    refusal = FromCloud(refusal=Refusal(kind=kind, reason="(overloaded) is busy")).SerializeToString()
    with pytest.raises(UserError) as caught:
        device.handle_message(refusal)
    assert error_of(caught.value).status_code == status
    with pytest.raises(UserError) as caught:
        device.handle_message(b"\xff")
    assert error_of(caught.value).status_code == 502


def test_a_method_that_there_is_not_is_answered_with_those_that_there_are(url):
    response = httpx2.get(f"{url}/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_defaults_that_a_plugin_cannot_run_with_are_refused_at_once(plugins):
    with pytest.raises(UserError, match="a plugin trained as 'spa' cannot run as 's3'"):
        Endpoint(plugins, Connection("127.0.0.1:1"), Defaults(mode=Mode("s3")))


def test_a_directory_of_a_plugin_may_have_an_equals_sign(tmp_path, plugins, monkeypatch):
    places = []
    (tmp_path / "lr=0.1" / "plugin").mkdir(parents=True)
    monkeypatch.setattr(
        "spa_jax.endpoint.server.load_plugin", lambda place: places.append(str(place)) or plugins["mine"]
    )
    place = str(tmp_path / "lr=0.1" / "plugin")
    found = load_plugins([place, f"mine={place}"])
    assert list(found) == ["lr=0.1", "mine"]
    assert places == [place, place]


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.0.0.2:0", "[::1]:0", "localhost:0"])
def test_who_asks_for_a_server_on_loopback_by_its_address_is_answered(address, plugins, monkeypatch):
    apps = []
    monkeypatch.setattr(uvicorn, "Config", lambda app, **_: apps.append(app))
    monkeypatch.setattr("spa_jax.endpoint.server.Server", Served)
    with listen(address, has_key=False) as listener:
        serve(Endpoint(plugins, Connection("127.0.0.1:1")), listener)
    client = TestClient(apps[0])
    name = address.removesuffix(":0")
    own = {name, f"{name}:8471", "localhost:8471", "127.0.0.1", "[::1]:8471"}
    answered = {host for host in (*own, *FOREIGN) if client.get("/health", headers={"Host": host}).status_code == 200}
    assert answered == own


@pytest.mark.parametrize("host", ["ö" * 70, "ö..x"])
def test_a_host_that_cannot_be_one_is_refused_by_name(host):
    for bind in (lambda address: listen(address, has_key=True), check_free):
        with pytest.raises(UserError, match=f"cannot listen on {host}:80"):
            bind(f"{host}:80")
