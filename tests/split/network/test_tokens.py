"""Who is known to a cloud: tokens and certificates are read again when they change, and guesses are slowed."""

import asyncio
import time

import grpc
import pytest
from streams import Stream, connected, metric, run

from spa_jax.split import server, tokens
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import ServerSecurity
from spa_jax.split.messages_pb2 import FromDevice
from spa_jax.split.request import open_message
from spa_jax.split.server import Limits
from spa_jax.split.streams import Room, address_of
from spa_jax.split.tokens import FORGIVEN_AFTER, MAX_KEPT, Guesses

HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def request_(plugin):
    return open_message(plugin, ["What is thing 1?"], 4)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of two tokens, at which the cloud looks often."""
    monkeypatch.setattr(server, "FILES_READ_EVERY", 0.05)
    path = tmp_path / "tokens"
    path.write_text("one\ntwo\n")
    return path


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still unless it is set."""
    now = [100.0]
    monkeypatch.setattr(tokens.time, "monotonic", lambda: now[0])
    return now


def bearer(token):
    return [("authorization", f"Bearer {token}")]


def test_each_wrong_token_makes_its_address_wait_longer_but_not_for_ever(clock, caplog):
    guesses, waits = Guesses(), []
    for number in range(9):
        waits.append(guesses.wait(HERE, "right"))
        guesses.add(HERE, f"wrong {number}", is_right=False)
    assert waits == [0, 0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1]
    assert guesses.wait("10.0.0.1", "right") == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{count} wrong device tokens from {HERE}" for count in (1, 2, 4, 8)
    ]
    clock[0] += FORGIVEN_AFTER + 1
    assert guesses.wait(HERE, "right") == 0


def test_a_token_that_was_right_at_its_address_does_not_wait(clock):
    guesses = Guesses()
    guesses.add(HERE, "right", is_right=True)
    for number in range(9):
        guesses.add(HERE, f"wrong {number}", is_right=False)
    assert [guesses.wait(HERE, token) for token in ("right", "another")] == [0, 1]


def test_few_addresses_are_kept(clock):
    guesses = Guesses()
    for number in range(MAX_KEPT + 9):
        guesses.add(f"10.0.0.{number}", "wrong", is_right=False)
        guesses.add(f"10.0.0.{number}", "right", is_right=True)
    assert len(guesses._wrong) == len(guesses._right) == MAX_KEPT
    assert (guesses.wait("10.0.0.8", "x"), guesses.wait("10.0.0.9", "x")) == (0, 0.05)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.1.2.3:4567", "10.1.2.3"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4567", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:4567", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4567", "fe80::/64"),
        ("ipv6:%5B::ffff:10.1.2.3%5D:4567", "10.1.2.3"),
        ("unix:", ""),
    ],
)
def test_an_address_is_what_one_host_has(peer, address):
    assert address_of(peer) == address


def test_guesses_are_slowed_and_a_right_token_from_there_is_not(cloud, plugin, request_, file, caplog, monkeypatch):
    wait, waits, stay, stays = Guesses.wait, {}, Room.stay, []

    def recorded(self, address, token):
        waits.setdefault(token, []).append(wait(self, address, token))
        return waits[token][-1]

    def counted(room, owner, seconds):
        stays.append(seconds)
        return stay(room, owner, seconds)

    monkeypatch.setattr(Guesses, "wait", recorded)
    monkeypatch.setattr(Room, "stay", counted)

    async def scenario(port):
        async with connected(port) as channel:

            async def code(token):
                return await Stream(channel, metadata=bearer(token)).call.code()

            async def seconds(token):
                began = time.monotonic()
                await generate(Connection(f"{HERE}:{port}", token=token), plugin, request_)
                return time.monotonic() - began

            await seconds("one")
            began = time.monotonic()
            codes = [await code(f"wrong {number}") for number in range(5)]
            slowed = time.monotonic() - began
            await seconds("one")
            new = await seconds("two")
            assert stays.count(None) == 5  # four of the wrong tokens and the new one wait, and the known one does not
            monkeypatch.setattr(Guesses, "wait", lambda *_: 5.0)  # all of them come before the first is looked at
            at_once = await asyncio.gather(*(code(f"wrong {number}") for number in range(50)))
            return codes, slowed, new, at_once

    codes, slowed, new, at_once = run(cloud, scenario, security=ServerSecurity(tokens=str(file)))
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}
    assert slowed > 0.05 + 0.1 + 0.2 + 0.4
    assert (waits["one"], waits["two"]) == ([0, 0], [0.8])
    assert new > 0.8
    looked_at = at_once.count(grpc.StatusCode.UNAUTHENTICATED)
    assert 0 < looked_at <= server.MAX_GUESSES_OF_ONE, "more tokens of an address were compared than may be at once"
    assert f"4 wrong device tokens from {HERE}" in caplog.text


def test_tokens_are_read_again_and_one_taken_away_ends_its_sessions(cloud, plugin, request_, file, caplog):
    here, sessions = in_process(cloud, plugin, request_), metric("spa_sessions")

    async def scenario(port):
        async with connected(port) as channel:
            stays = Stream(channel, FromDevice(open=request_), bearer("one"))
            assert (await stays.receive()).HasField("opened")
            leaves = Stream(channel, FromDevice(open=request_), bearer("two"))
            assert (await leaves.receive()).HasField("opened")
            waits = Stream(channel, FromDevice(open=request_), bearer("two"))
            assert (await waits.receive()).HasField("queued")
            file.write_text("one\nthree\n")
            async with asyncio.timeout(5):
                while await leaves.receive() is not None:
                    pass
                while (message := await waits.receive()).HasField("queued"):
                    pass
            assert message.refusal.kind == "unknown-token"
            again = Stream(channel, metadata=bearer("two"))
            assert await again.call.code() == grpc.StatusCode.UNAUTHENTICATED
            assert metric("spa_sessions") == sessions + 1
            for damaged in (b"", b"\xff\n"):
                file.write_bytes(damaged)
                while "what was read before holds" not in caplog.text:
                    await asyncio.sleep(0.01)
                caplog.clear()
            file.unlink()
            while "what was read before holds" not in caplog.text:
                await asyncio.sleep(0.01)
            there = await generate(Connection(f"{HERE}:{port}", token="three"), plugin, request_)
            assert metric("spa_sessions") == sessions + 1
            return there

    limits = Limits(deadline=30, sessions_per_token=1)
    there = run(cloud, scenario, limits, ServerSecurity(tokens=str(file)))
    assert there.generations == here.generations


def test_a_certificate_is_read_again_for_the_next_connection(cloud, plugin, request_, tmp_path, caplog):
    trustme = pytest.importorskip("trustme")
    authorities = [trustme.CA(), trustme.CA()]
    for number, authority in enumerate(authorities):
        authority.cert_pem.write_to_path(tmp_path / f"ca{number}")

    def install(number):
        own = authorities[number].issue_cert(HERE)
        own.cert_chain_pems[0].write_to_path(tmp_path / "cert")
        own.private_key_pem.write_to_path(tmp_path / "key")

    install(0)

    async def scenario(port):
        async def trusts(number):
            connection = Connection(f"{HERE}:{port}", tls=True, ca=f"{tmp_path}/ca{number}", patience=0)
            try:
                return (await generate(connection, plugin, request_)).generations
            except Exception as error:
                return "not to be trusted" in str(error)

        found = [await trusts(0), await trusts(1)]
        install(1)
        found += [await trusts(1), await trusts(0)]
        (tmp_path / "key").write_text("damaged")
        found.append(await trusts(1))
        assert "what was read before holds" in caplog.text
        install(0)
        return [*found, await trusts(0)]

    here = in_process(cloud, plugin, request_).generations
    found = run(cloud, scenario, security=ServerSecurity(f"{tmp_path}/cert", f"{tmp_path}/key"))
    assert found == [here, True, here, True, here, here]
