"""Cloud and device over gRPC: what they say, and what happens when one of them misbehaves or is gone."""

import asyncio
import copy
import dataclasses
import gc
import time

import jax
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from streams import Stream, by_hand, connected, metric, run, tokens_of
from tiny_split import make_plugin, random_plugin

from spa_jax.decoding.beam import Beams
from spa_jax.engine.extents import UNIT
from spa_jax.errors import UserError
from spa_jax.split import wire
from spa_jax.split.client import generate
from spa_jax.split.connection import Connection
from spa_jax.split.device import Device
from spa_jax.split.generation import generate as in_process
from spa_jax.split.grpc_channel import SERVICE, ServerSecurity
from spa_jax.split.memory import kept_bytes
from spa_jax.split.messages_pb2 import Cancel, FromCloud, FromDevice, Opened, Progress, Reopen, Taps, Tensor
from spa_jax.split.request import device_for, open_message
from spa_jax.split.server import Limits
from spa_jax.split.server_session import Outbox
from spa_jax.split.sessions import Sessions
from spa_jax.split.trust import merge_progress

PROMPTS, NEW = ["What is thing 1?", "And thing 2, if you please?"], 10


@pytest.fixture(scope="module")
def request_of(plugin):
    return lambda beams=None, new=NEW: open_message(plugin, PROMPTS, new, beams=beams)


@pytest.mark.parametrize(
    ("entry", "edits", "kind", "beams"),
    [
        ("head", "targets", "tokenwise", None),
        ("head", "targets", "tokenwise", Beams(3)),
        (2, "targets", "tokenwise", Beams(3)),
        (0, "all", "transformer", None),
        pytest.param(0, "targets", "transformer", None, marks=pytest.mark.slow),
        pytest.param(2, "all", "tokenwise", Beams(3), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_over_the_network_it_says_what_it_says_in_one_process(entry, edits, kind, beams, backbone, cloud):
    plugin = random_plugin(backbone, "s1", kind=kind, entry=entry, edits=edits)
    request, seen = open_message(plugin, PROMPTS, NEW, beams=beams), []
    here = in_process(cloud, plugin, request)

    async def scenario(port):
        return await generate(Connection(f"127.0.0.1:{port}"), plugin, request, seen.append)

    there = run(cloud, scenario)
    assert [g.tokens for g in there.generations] == [g.tokens for g in here.generations]
    assert [g.consulted for g in there.generations] == [g.consulted for g in here.generations]
    assert (there.degraded, there.traffic.exchanges) == (0, here.traffic.exchanges)
    assert (there.uncorrected_prompts, there.traffic.opening_exchanges) == (0, here.traffic.opening_exchanges)
    assert (here.traffic.opening_exchanges > 0) == (edits == "all")
    assert there.texts == [backbone.tokenizer.decode(g.tokens, skip_special_tokens=True) for g in here.generations]
    assert ["".join(answer.pieces) for answer in seen[-1].generated] == there.texts
    assert seen[-1].done


BAD = {
    "wrong shape": lambda taps, honest: [dataclass_reply(honest, g=Tensor(values=b"123"))],
    "nan": lambda taps, honest: [dataclass_reply(honest, g=Tensor(values=b"\xff" * len(honest.g.values)))],
}


def dataclass_reply(honest, **changed):
    copy = type(honest)()
    copy.CopyFrom(honest)
    for name, value in changed.items():
        getattr(copy, name).CopyFrom(value)
    return FromDevice(reply=copy)


@pytest.mark.parametrize("case", BAD)
def test_an_answer_that_makes_no_sense_is_done_without(case, cloud, plugin, request_of):
    base = in_process(cloud, plugin, open_message(plugin, PROMPTS, NEW, setting="base"))
    progress = run(cloud, lambda port: by_hand(port, plugin, request_of(), BAD[case]))
    assert tokens_of(progress) == [g.tokens for g in base.generations]
    assert progress.degraded == sum(map(len, tokens_of(progress)))


def test_late_double_and_foreign_messages_are_dropped(cloud, plugin, request_of):
    here = in_process(cloud, plugin, request_of())

    def noisy(taps, honest):
        reply = FromDevice(reply=honest).SerializeToString()
        early = type(honest)(step=honest.step + 7, g=honest.g)
        return [b"\x07nonsense", FromDevice(reply=early), reply, reply]

    progress = run(cloud, lambda port: by_hand(port, plugin, request_of(), noisy))
    assert tokens_of(progress) == [g.tokens for g in here.generations]
    assert progress.degraded == 0


def test_a_slow_device_costs_its_deadline_and_another_one_nothing(cloud, plugin, request_of, monkeypatch):
    here, await_reply = in_process(cloud, plugin, request_of()), Sessions._await_reply

    async def await_silent_for_less(self, session, may_compile):
        if session.generation.plan.task.limit == 2:
            self = copy.copy(self)
            self._limits = Limits(deadline=3.0, first_deadline=0)
        await await_reply(self, session, may_compile)

    monkeypatch.setattr(Sessions, "_await_reply", await_silent_for_less)

    async def scenario(port):
        silent = by_hand(port, plugin, request_of(new=2), lambda taps, honest: [])
        honest = generate(Connection(f"127.0.0.1:{port}"), plugin, request_of())
        return await asyncio.gather(silent, honest)

    silent, honest = run(cloud, scenario, Limits(deadline=60))
    assert silent.degraded == sum(map(len, tokens_of(silent))) > 0
    assert [g.tokens for g in honest.generations] == [g.tokens for g in here.generations]
    assert honest.degraded == 0


def test_a_device_that_lost_its_line_comes_back_and_goes_on(cloud, plugin, request_of):
    here = in_process(cloud, plugin, request_of())

    async def scenario(port):
        request = request_of()
        async with connected(port) as channel:
            stream = Stream(channel, FromDevice(open=request))
            opened = (await stream.receive()).opened
            device = device_for(plugin, request, list(opened.lengths))
            for _ in range(3):
                while not (message := await stream.receive()).HasField("taps"):
                    pass
                stream.send(FromDevice(reply=device.receive(message.taps)))
        async with connected(port) as channel:
            stream, progress = Stream(channel, FromDevice(reopen=Reopen(session=opened.session))), Progress()
            while True:
                message = await stream.receive()
                if message.HasField("taps"):
                    stream.send(FromDevice(reply=device.receive(message.taps)))
                if message.HasField("progress"):
                    progress = merge_progress(progress, message.progress)
                    if progress.done:
                        return progress

    progress = run(cloud, scenario)
    assert tokens_of(progress) == [g.tokens for g in here.generations]
    assert progress.degraded == 0


def test_cancelling_ends_the_session(cloud, plugin, request_of):
    async def scenario(port):
        async with connected(port) as channel:
            stream = Stream(channel, FromDevice(open=request_of()))
            session = (await stream.receive()).opened.session
            stream.send(FromDevice(cancel=Cancel()))
            while await stream.receive() is not None:
                pass
            again = Stream(channel, FromDevice(reopen=Reopen(session=session)))
            return await again.receive()

    assert run(cloud, scenario).refusal.kind == "unknown-session"


def test_a_cancellation_that_comes_with_an_answer_is_not_lost(cloud, plugin, request_of):
    async def scenario(port):
        before = metric("spa_sessions")
        async with connected(port) as channel:
            request = request_of()
            streams = [Stream(channel, FromDevice(open=request)) for _ in range(16)]
            for stream in streams:
                device = device_for(plugin, request, list((await stream.receive()).opened.lengths))
                while not (message := await stream.receive()).HasField("taps"):
                    pass
                stream.send(FromDevice(reply=device.receive(message.taps)))
                stream.send(FromDevice(cancel=Cancel()))
            async with asyncio.timeout(10):
                while metric("spa_sessions") > before:
                    await asyncio.sleep(0.01)

    run(cloud, scenario, Limits(deadline=60))


def test_more_sessions_than_there_is_room_for_are_refused_by_kind(cloud, plugin, request_of):
    async def scenario(port):
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_of()))
            assert (await first.receive()).HasField("opened")
            second = await Stream(channel, FromDevice(open=request_of())).receive()
            first.send(FromDevice(cancel=Cancel()))
            return second

    assert run(cloud, scenario, Limits(sessions=1, deadline=30, queue=0)).refusal.kind == "overloaded"


def test_a_health_check_finds_the_service(cloud):
    async def scenario(port):
        async with connected(port) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            return await check(health_pb2.HealthCheckRequest(service=SERVICE))

    assert run(cloud, scenario).status == health_pb2.HealthCheckResponse.SERVING


def test_a_second_stream_of_a_session_takes_the_place_of_the_first(cloud, backbone, request_of):
    async def scenario(port):
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_of()))
            opened = (await first.receive()).opened
            assert (opened.version, opened.backbone) == (wire.VERSION, backbone.fingerprint)
            session = opened.session
            second = Stream(channel, FromDevice(reopen=Reopen(session=session)))
            assert (await second.receive()).opened.session == session
            while await first.receive() is not None:
                pass
            assert (await second.receive()).HasField("taps")
            second.send(FromDevice(cancel=Cancel()))

    run(cloud, scenario)


def test_memory_is_bounded_and_one_generation_that_needs_more_is_told_so(cloud, plugin, request_of):
    need = cloud.plan(request_of()).bytes

    async def scenario(port):
        async with connected(port) as channel:
            first = Stream(channel, FromDevice(open=request_of()))
            assert (await first.receive()).HasField("opened")
            second = await Stream(channel, FromDevice(open=request_of())).receive()
            large = await Stream(channel, FromDevice(open=request_of(Beams(8)))).receive()
            first.send(FromDevice(cancel=Cancel()))
            return second.refusal, large.refusal

    second, large = run(cloud, scenario, Limits(memory=int(1.5 * need), deadline=30, queue=0))
    assert (second.kind, "taken by other sessions" in second.reason) == ("overloaded", True)
    assert (large.kind, "ask for fewer" in large.reason) == ("refused", True)


@pytest.mark.slow
def test_the_memory_that_is_planned_is_the_memory_that_is_taken(cloud, plugin):
    for kind in ("tokenwise", "transformer"):
        for beams in (None, Beams(5)):
            request = open_message(make_plugin("s1", kind), PROMPTS, 40, beams=beams)
            request.backbone = plugin.fingerprint
            plan = cloud.plan(request)
            generation, most = cloud.begin(plan), 0
            cache = sum(len(group.extent) for group in generation._groups) // UNIT * cloud.engine.slots.unit_bytes
            while generation.next_question() is not None:
                groups = generation._groups
                unsent = [each.unsent for group in groups for each in group.hypotheses]
                kept = jax.tree.leaves([(group.prompt_taps, group.state, group.task.kernel) for group in groups])
                kept += jax.tree.leaves(unsent)
                most = max(most, sum({id(leaf): getattr(leaf, "nbytes", 8) for leaf in kept}.values()))
                generation.apply_reply(None)
            taken = cache + most
            kept = kept_bytes(
                cloud._backbone.config, plan.task, plan.lengths.tolist(), plan.codec, cloud.engine.slots.unit_bytes
            )
            assert 0.5 < taken / kept <= 1.1
            assert taken < plan.bytes


def test_a_token_has_its_share_of_sessions(cloud, request_of, tmp_path):
    (tmp_path / "tokens").write_text("one\ntwo\n")

    async def scenario(port):
        kinds = []
        async with connected(port) as channel:
            for token in ("one", "one", "two"):
                stream = Stream(channel, FromDevice(open=request_of()), [("authorization", f"Bearer {token}")])
                kinds.append((await stream.receive()).WhichOneof("message"))
        return kinds

    limits = Limits(sessions_per_token=1, deadline=30, queue=0)
    assert run(cloud, scenario, limits, ServerSecurity(tokens=str(tmp_path / "tokens"))) == [
        "opened", "refusal", "opened",
    ]  # fmt: skip


def test_what_a_device_does_not_read_is_replaced_by_what_is_newer():
    outbox = Outbox()
    opened, prompt = (
        FromCloud(opened=Opened(session="s")),
        [FromCloud(taps=Taps(prompt=True, rows=[n])) for n in (1, 2)],
    )
    steps = [FromCloud(taps=Taps(step=step)) for step in (1, 2, 3)]
    news = [FromCloud(progress=Progress(degraded=n)) for n in (1, 2)]
    for message in (opened, *prompt, steps[0], news[0], steps[1], news[1], steps[2]):
        outbox.put_latest(message)
    outbox.close()

    async def drained():
        return [message async for message in outbox.messages()]

    both = FromCloud(taps=Taps(step=3), progress=Progress(degraded=2))
    assert asyncio.run(drained()) == [opened, *prompt, both]


def test_tokens_come_beside_the_question_that_follows_from_them(cloud, plugin):
    request = open_message(plugin, ["Short?"], 4, setting="s1")
    here = in_process(cloud, plugin, request)

    async def scenario(port):
        async with connected(port) as channel:
            stream, device, heard = Stream(channel, FromDevice(open=request)), None, []
            while (message := await stream.receive()) is not None:
                if message.HasField("opened"):
                    device = device_for(plugin, request, list(message.opened.lengths))
                if message.HasField("taps"):
                    stream.send(FromDevice(reply=device.receive(message.taps)))
                tokens = [token for each in message.progress.generated for token in each.tokens]
                heard.append((message.HasField("taps"), tokens))
            return heard

    tokens = here.generations[0].tokens
    assert len(tokens) > 1
    assert run(cloud, scenario) == [
        (False, []), (True, []), *[(True, [token]) for token in tokens[:-1]], (False, tokens[-1:])
    ]  # fmt: skip


def test_a_device_that_comes_back_before_it_had_the_whole_prompt_is_told_again(cloud, plugin):
    """The side network attends; nothing was answered yet, so nothing can be missing."""
    attending = dataclasses.replace(make_plugin("s1", "transformer"), fingerprint=plugin.fingerprint)
    long = ["What is thing 1? " * 3, "Short?"]
    request = open_message(attending, long, 4)
    here = in_process(cloud, attending, request)

    async def scenario(port):
        async with connected(port) as channel:
            stream = Stream(channel, FromDevice(open=request))
            session = (await stream.receive()).opened.session
            assert (await stream.receive()).taps.prompt
        async with connected(port) as channel:
            stream = Stream(channel, FromDevice(reopen=Reopen(session=session)))
            device, progress = None, Progress()
            while not progress.done:
                message = await stream.receive()
                if message.HasField("opened"):
                    device = device_for(attending, request, list(message.opened.lengths))
                if message.HasField("taps") and (reply := device.receive(message.taps)) is not None:
                    stream.send(FromDevice(reply=reply))
                if message.HasField("progress"):
                    progress = merge_progress(progress, message.progress)
            return progress

    progress = run(cloud, scenario)
    assert tokens_of(progress) == [g.tokens for g in here.generations]
    assert progress.degraded == 0


def test_a_device_that_is_too_slow_skips_to_the_newest_question(cloud, plugin, request_of, monkeypatch):
    """Else it would answer one question late for ever."""
    receive, seen = Device.receive, []

    def slow(self, taps):
        seen.append(taps.step)
        while len(seen) == 2 and metric("spa_exchanges_total") < asked + 6:
            time.sleep(0.01)
        return receive(self, taps)

    monkeypatch.setattr(Device, "receive", slow)
    asked = metric("spa_exchanges_total")

    async def scenario(port):
        return await generate(Connection(f"127.0.0.1:{port}"), plugin, request_of())

    result = run(cloud, scenario, Limits(deadline=0.4))
    assert result.degraded >= 4 * len(PROMPTS)
    assert 3 not in seen, "a question was answered that was out of date"


@pytest.mark.parametrize("first", [b"\xff\xffgarbage", b"", FromDevice(cancel=Cancel()).SerializeToString()])
def test_a_stream_that_begins_with_something_else_is_refused(first, cloud):
    async def scenario(port):
        async with connected(port) as channel:
            return await Stream(channel, first).receive()

    assert run(cloud, scenario).refusal.kind == "refused"


def test_what_the_cloud_refuses_the_device_says(cloud, plugin, request_of):
    request = request_of()
    request.version = 99

    async def scenario(port):
        await generate(Connection(f"127.0.0.1:{port}"), plugin, request)

    with pytest.raises(UserError, match=f"version 99 of the protocol and the cloud version {wire.VERSION}"):
        run(cloud, scenario)


def test_a_generation_leaves_no_task_behind(plugin, cloud, request_of, caplog):
    async def scenario(port):
        for _ in range(3):
            await generate(Connection(f"127.0.0.1:{port}"), plugin, request_of())
        unwanted = asyncio.create_task(generate(Connection(f"127.0.0.1:{port}"), plugin, request_of(new=60)))
        await asyncio.sleep(0.2)
        unwanted.cancel()
        await asyncio.gather(unwanted, return_exceptions=True)
        gc.collect()
        await asyncio.sleep(0.1)

    run(cloud, scenario)
    assert [line for line in caplog.messages if "Task" in line] == []
