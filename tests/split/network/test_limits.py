"""Limits of what devices may use of a cloud, and what it will not start with."""

import dataclasses
import threading
import time

import pytest
from streams import Stream, connected, metric, run, tokens_of
from tiny_split import generate_and_record, make_plugin, random_plugin

from spa_jax.errors import UserError
from spa_jax.split import plan
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection, read_token
from spa_jax.split.device import Device
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import ServerSecurity, trusted_roots
from spa_jax.split.messages_pb2 import Cancel, ChatMessage, FromDevice, Prompt, Reopen
from spa_jax.split.request import open_message
from spa_jax.split.server import Limits, serving
from spa_jax.split.sessions import Sessions

PROMPTS, NEW = ["What is thing 1?"], 4


@pytest.fixture(scope="module")
def request_(plugin):
    return open_message(plugin, PROMPTS, NEW)


def test_sessions_that_are_opened_at_once_count_for_their_token(cloud, request_, tmp_path):
    (tmp_path / "tokens").write_text("one\n")

    async def scenario(port):
        async with connected(port) as channel:
            header = [("authorization", "Bearer one")]
            streams = [Stream(channel, FromDevice(open=request_), header) for _ in range(6)]
            firsts = [await stream.receive() for stream in streams]
            for stream in streams:
                stream.send(FromDevice(cancel=Cancel()))
            return firsts

    firsts = run(
        cloud, scenario, Limits(sessions_per_token=2, deadline=30, queue=0), ServerSecurity(tokens=f"{tmp_path}/tokens")
    )
    assert sorted(first.WhichOneof("message") for first in firsts) == 2 * ["opened"] + 4 * ["refusal"]
    assert {first.refusal.kind for first in firsts if first.HasField("refusal")} == {"overloaded"}


def test_a_finished_session_takes_no_room_and_its_result_can_be_had_again_for_a_while(cloud, plugin, request_):
    """As many results are kept as there may be sessions."""
    here = in_process(cloud, plugin, request_)

    async def scenario(port):
        sessions, again = [], []
        async with connected(port) as channel:
            for _ in range(3):
                device = Stream(channel, FromDevice(open=request_))
                sessions.append((await device.receive()).opened.session)
                while await device.receive() is not None:
                    pass
            for name in sessions:
                back = Stream(channel, FromDevice(reopen=Reopen(session=name)))
                first = await back.receive()
                again.append(await back.receive() if first.HasField("opened") else first)
        return again

    limits = Limits(sessions=2, deadline=0.05, first_deadline=0)
    gone, *kept = run(cloud, scenario, limits)
    base = in_process(cloud, plugin, open_message(plugin, PROMPTS, NEW, setting="base"))
    assert gone.refusal.kind == "unknown-session"
    for message in kept:
        assert message.progress.done
        assert (
            tokens_of(message.progress) == [g.tokens for g in base.generations] != [g.tokens for g in here.generations]
        )


def test_a_device_that_has_answered_is_not_sent_the_prompt_again(cloud, backbone):
    plugin = dataclasses.replace(make_plugin("s1", "transformer"), fingerprint=backbone.fingerprint)

    async def scenario(port):
        is_prompt = []
        async with connected(port) as channel:
            stream = Stream(channel, FromDevice(open=open_message(plugin, PROMPTS, NEW)))
            name = (await stream.receive()).opened.session
            for step in (0, 1):
                stream = Stream(channel, FromDevice(reopen=Reopen(session=name, step=step)))
                assert (await stream.receive()).HasField("opened")
                is_prompt.append((await stream.receive()).taps.prompt)
            stream.send(FromDevice(cancel=Cancel()))
        return is_prompt

    assert run(cloud, scenario) == [True, False]


def test_a_device_has_longer_for_its_first_answer(cloud, plugin, request_, monkeypatch):
    """It compiles its programs then."""
    receive = Device.receive

    async def scenario(port):
        seen, asked = [], metric("spa_exchanges_total")

        def slow(self, taps):
            if taps.step == 1:
                waited.wait(1.0)
                assert metric("spa_exchanges_total") == asked + 1, "the cloud has gone on"
            return receive(self, taps)

        waited = threading.Event()
        monkeypatch.setattr(Device, "receive", slow)
        await generate(
            Connection(f"127.0.0.1:{port}"), plugin, request_, lambda progress: seen.append(progress.degraded)
        )
        return seen[0]

    assert run(cloud, scenario, Limits(deadline=0.2, first_deadline=60)) == 0


def test_a_device_too_slow_for_an_opening_gets_what_an_uncorrected_prompt_gives(cloud, backbone, monkeypatch):
    plugin = random_plugin(backbone, "s1", kind="transformer", entry=0, edits="all")
    asked, receive = open_message(plugin, PROMPTS, NEW), Device.receive
    lost, _ = generate_and_record(cloud, plugin, asked, lambda exchange: "arrives" if exchange else "answer lost")
    assert lost.uncorrected_prompts == len(PROMPTS)
    assert lost.generations != in_process(cloud, plugin, asked).generations
    before, missed = metric("spa_uncorrected_prompts_total"), metric("spa_deadlines_missed_total")

    def slow(self, taps):
        latest = time.monotonic() + 60
        while taps.prompt and taps.step and metric("spa_deadlines_missed_total") == missed:
            assert time.monotonic() < latest
            time.sleep(0.01)
        return receive(self, taps)

    monkeypatch.setattr(Device, "receive", slow)
    monkeypatch.setattr(Sessions, "_await_reply", impatient(Sessions._await_reply))
    there = run(cloud, lambda port: generate(Connection(f"127.0.0.1:{port}"), plugin, asked), Limits(deadline=60))
    assert there.generations == lost.generations
    assert (there.uncorrected_prompts, there.degraded) == (len(PROMPTS), 0)
    assert metric("spa_uncorrected_prompts_total") == before + len(PROMPTS)


def impatient(await_reply):
    """Makes `Sessions._await_reply` wait 0.1 s for a part of a prompt."""

    async def wait(self, session, *arguments):
        limits = self._limits
        if session.question.prompt:
            self._limits = dataclasses.replace(limits, deadline=0.1, first_deadline=0)
        try:
            await await_reply(self, session, *arguments)
        finally:
            self._limits = limits

    return wait


def test_requests_that_would_keep_others_waiting_are_refused_unread(cloud, plugin, monkeypatch):
    def never(*_):
        raise AssertionError("it was read")

    monkeypatch.setattr(plan, "Encoder", never)
    many, long, talkative = (open_message(plugin, PROMPTS, NEW) for _ in range(3))
    many.prompts.extend([Prompt(text="a")] * plan.MAX_PROMPTS)
    long.prompts.extend([Prompt(text="a" * plan.MAX_PROMPT_SIZE)])
    talkative.prompts.extend([Prompt(messages=[ChatMessage(role="user")] * (plan.MAX_MESSAGES + 1))])
    for request in (many, long, talkative):
        with pytest.raises(UserError, match="more than the cloud takes at once"):
            cloud.plan(request)


def test_a_generation_without_a_question_has_its_first_token_counted(cloud, plugin):
    def counted():
        return metric("spa_seconds_to_first_token_sum"), metric("spa_bytes_up_total")

    request = open_message(plugin, PROMPTS, NEW, setting="base")
    before = counted()
    result = run(cloud, lambda port: generate(Connection(f"127.0.0.1:{port}"), plugin, request))
    seconds, up = (now - then for now, then in zip(counted(), before))
    assert result.traffic.exchanges == 0
    assert seconds > 0
    assert up >= request.ByteSize()


def test_a_port_that_is_taken_is_not_shared(cloud):
    async def scenario(port):
        with pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1:{port}"):
            async with serving(cloud, f"127.0.0.1:{port}", Limits(), ServerSecurity()):
                pass

    run(cloud, scenario)


@pytest.mark.parametrize(
    ("limits", "says"),
    [({"deadline": 0}, "deadline is 0"), ({"sessions": -1}, "sessions is -1"), ({"linger": -1.0}, "linger is -1.0"),
     ({"deadline": float("nan")}, "deadline is nan")],
)  # fmt: skip
def test_limits_nothing_could_be_within_are_refused(limits, says):
    with pytest.raises(UserError, match=says):
        Limits(**limits).check()


def test_files_that_are_no_certificates_are_named(tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    one, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    for name, pem in (("cert", one.cert_chain_pems[0]), ("key", one.private_key_pem), ("other", other.private_key_pem)):
        pem.write_to_path(tmp_path / name)
    (tmp_path / "text").write_text("no certificate")
    (tmp_path / "empty").write_text("")
    assert ServerSecurity(f"{tmp_path}/cert", f"{tmp_path}/key").credentials() is not None
    for cert, key in (("text", "key"), ("cert", "text"), ("cert", "other"), ("empty", "empty")):
        with pytest.raises(UserError, match=f"{cert}' and '.*{key}' are no certificate and its key"):
            ServerSecurity(f"{tmp_path}/{cert}", f"{tmp_path}/{key}").credentials()
    assert trusted_roots(f"{tmp_path}/cert") == (tmp_path / "cert").read_bytes()
    for name in ("text", "empty"):
        with pytest.raises(UserError, match="holds no certificates as PEM"):
            trusted_roots(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("held", "says"),
    [(b"", "is empty"), (b" \n\n", "is empty"), ("schlüssel\n".encode(), "printable ASCII"), (b"\xff\xfe\n", "ASCII"),
     (b"a\x00b\n", "printable ASCII")],
)  # fmt: skip
def test_token_files_that_no_header_can_carry_are_refused(held, says, tmp_path):
    (tmp_path / "tokens").write_bytes(held)
    with pytest.raises(UserError, match=says):
        ServerSecurity(tokens=f"{tmp_path}/tokens").device_tokens()
    with pytest.raises(UserError, match=says):
        read_token(f"{tmp_path}/tokens")


def test_a_device_has_one_token_and_a_cloud_as_many_as_there_are_lines(tmp_path):
    (tmp_path / "tokens").write_text("one\n\n two \n")
    assert ServerSecurity(tokens=f"{tmp_path}/tokens").device_tokens() == {"one", "two"}
    with pytest.raises(UserError, match="holds 2 tokens, and a device has one"):
        read_token(f"{tmp_path}/tokens")
    (tmp_path / "tokens").write_text(" one\n")
    assert read_token(f"{tmp_path}/tokens") == "one"
    assert read_token("") == ""


@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer tw", "Bearer twoo", "Bearer TWO"])
def test_a_token_that_is_nearly_right_is_wrong(given, cloud, plugin, request_, tmp_path):
    (tmp_path / "tokens").write_text("one\ntwo\n")

    async def scenario(port):
        async with connected(port) as channel:
            return await Stream(channel, metadata=[("authorization", given)]).call.code()

    assert run(cloud, scenario, security=ServerSecurity(tokens=f"{tmp_path}/tokens")).name == "UNAUTHENTICATED"
