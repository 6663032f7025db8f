"""Messages to the device, in which order they cross, and what comes of those that are lost, repeated or wrong."""

from itertools import pairwise

import numpy as np
import pytest
from tiny_split import NEW, SIDES, TIE, generate_and_record, judge, make_plugin, make_prompts, tokens_asked

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import GREEDY
from spa_jax.engine.schedule import Pace
from spa_jax.split import device as device_module
from spa_jax.split import opening, wire
from spa_jax.split.device import Device, TokenChoice
from spa_jax.split.generation import generate
from spa_jax.split.messages_pb2 import Reply, Taps
from spa_jax.split.opening import CHUNK_POSITIONS
from spa_jax.split.request import device_for, open_message
from spa_jax.split.wire import WireError

PROMPTS = make_prompts(19)
SEEDS = {0: 7, 2: 7}
"""Seeds of the plugins at inner entries."""
KINDS = [
    ("tokenwise", None, "head"), ("transformer", None, "head"), ("transformer", 4, "head"), ("tokenwise", None, 0),
    ("transformer", 3, 2),
]  # fmt: skip


def _request(kind, width, entry="head", **how):
    plugin = make_plugin("spa", kind, SEEDS.get(entry, 4), entry)
    return plugin, open_message(plugin, PROMPTS, NEW, beams=Beams(width) if width else None, **how)


def _said(result):
    return [(generation.tokens, generation.consulted) for generation in result.generations]


def _some_lost(exchange):
    return {1: "question lost", 2: "answer lost", 5: "answer lost", 6: "question lost"}.get(exchange % 8, "arrives")


def test_every_position_is_sent_once_and_none_is_left_out(cloud):
    plugin, request = _request("transformer", None)
    result, channel = generate_and_record(cloud, plugin, request)
    sent, asked = (
        [Taps.FromString(message) for message in part] for part in (channel.sent, next(zip(*channel.exchanged)))
    )
    before = [(group, position) for taps in sent for group, position in zip(taps.rows, taps.positions)]
    assert before == [(group, position) for group, prompt in enumerate(PROMPTS) for position in range(len(prompt) - 1)]
    assert all(taps.prompt and (taps.step, taps.base, len(taps.origins)) == (0, 0, 0) for taps in sent)
    assert [(taps.step, taps.base) for taps in asked] == [(step + 1, step) for step in range(len(asked))]
    assert not any(taps.prompt or taps.origins for taps in asked)
    for group, (prompt, generation) in enumerate(zip(PROMPTS, result.generations)):
        positions = [p for taps in asked for row, p in zip(taps.rows, taps.positions) if row == group]
        last = max((at for at, flag in enumerate(generation.consulted) if flag), default=-1)
        assert positions == list(range(len(prompt) - 1, len(prompt) + last))
    asked_at = [np.flatnonzero(generation.consulted) for generation in result.generations]
    assert any(later - earlier > 1 for at in asked_at for earlier, later in pairwise(at)), "nothing to catch up"


def test_the_token_wise_kind_is_sent_what_is_asked_for(cloud):
    plugin, request = _request("tokenwise", None)
    result, channel = generate_and_record(cloud, plugin, request)
    asked = [which for message, _ in channel.exchanged for which in tokens_asked(message, PROMPTS, 1)]
    assert not channel.sent
    assert sum(len(Taps.FromString(message).rows) for message, _ in channel.exchanged) == len(asked) == len(set(asked))
    for group, generation in enumerate(result.generations):
        tokens = [token for row, _, token in asked if row == group]
        assert tokens == np.flatnonzero(generation.consulted).tolist()


def test_a_search_asks_for_its_first_token_once(cloud):
    plugin, request = _request("transformer", 4, threshold=0)
    _, channel = generate_and_record(cloud, plugin, request)
    first, second = (tokens_asked(message, PROMPTS, 4) for message, _ in channel.exchanged[:2])
    assert first == [(group, 4 * group, 0) for group in range(4)]
    assert second == [(row // 4, row, 1) for row in range(16)]


def test_a_long_prompt_comes_in_parts(cloud, monkeypatch):
    plugin, request = _request("transformer", None)
    whole, channel = generate_and_record(cloud, plugin, request)
    assert max(len(prompt) for prompt in PROMPTS) < CHUNK_POSITIONS
    assert len(channel.sent) == len(PROMPTS)
    monkeypatch.setattr(opening, "CHUNK_POSITIONS", 7)
    parts, channel = generate_and_record(cloud, plugin, request)
    assert _said(parts) == _said(whole)
    assert [len(Taps.FromString(message).rows) for message in channel.sent] == [
        min(7, len(prompt) - 1 - begin) for prompt in PROMPTS for begin in range(0, len(prompt) - 1, 7)
    ]


@pytest.mark.parametrize(("kind", "width", "entry"), KINDS)
def test_messages_that_come_twice_mean_what_they_mean_once(kind, width, entry, cloud, monkeypatch):
    monkeypatch.setattr(Pace, "part_tokens", lambda *_: 512)  # else it depends on the time which prompts run together
    plugin, request = _request(kind, width, entry)
    once, channel = generate_and_record(cloud, plugin, request)
    twice, again = generate_and_record(cloud, plugin, request, times=2)
    assert twice.generations == once.generations
    assert again.exchanged == channel.exchanged


@pytest.mark.parametrize(("kind", "width", "entry"), KINDS)
def test_after_a_loss_all_is_as_if_the_device_had_been_in_step(kind, width, entry, backbone, cloud):
    plugin, request = _request(kind, width, entry)
    result, channel = generate_and_record(cloud, plugin, request, _some_lost)
    assert result.degraded == len(channel.lost) > 3
    beams = Beams(width) if width else None
    verdicts = []
    for group, prompt in enumerate(PROMPTS):
        verdicts.append(judge(backbone, plugin, "spa", prompt, beams, lost={t for g, t in channel.lost if g == group}))
        assert min(verdicts[-1].gaps) > TIE, "float noise could decide this case: choose another seed"
    assert _said(result) == [(verdict.generation.tokens, verdict.generation.consulted) for verdict in verdicts]
    undisturbed = generate(cloud, plugin, request)
    assert _said(undisturbed) != _said(result)
    compared = 0
    for message, answer in channel.exchanged:
        asked = tokens_asked(message, PROMPTS, width or 1)
        if answer is None:
            continue
        g = np.frombuffer(Reply.FromString(answer).g.values, np.float32).reshape(-1, 32)
        for (group, row, token), said in zip(asked, g, strict=True):
            np.testing.assert_allclose(said, verdicts[group].corrections[token][row % (width or 1)], atol=1e-4)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize(("kind", "width", "entry"), KINDS)
def test_a_device_that_never_answers_is_one_that_is_never_asked(kind, width, entry, cloud):
    plugin, request = _request(kind, width, entry)
    silent, channel = generate_and_record(cloud, plugin, request, lambda exchange: "question lost")
    never = generate(cloud, plugin, _request(kind, width, entry, threshold=1.0)[1])
    assert _said(silent) == _said(never)
    for one, other in zip(silent.generations, never.generations):  # which groups share a call differs
        assert one.score == (None if width is None else pytest.approx(other.score, abs=TIE))
    assert silent.degraded == len(channel.lost) > 0
    assert (never.degraded, never.traffic.exchanges) == (0, 0)


def test_the_device_compiles_once_for_the_token_wise_kind_and_seldom_for_the_other(cloud):
    for kind, most in (("tokenwise", 1), ("transformer", 4)):
        plugin, request = _request(kind, None)
        device_module.correct.clear_cache()
        generate(cloud, plugin, request)
        assert 1 <= device_module.correct._cache_size() <= most


@pytest.fixture
def question():
    """A device that attends, with the rows and slots of the generations above, and its first question."""
    taps = np.random.default_rng(0).standard_normal((3, 3, 32)).astype(np.float32)
    message = Taps(step=1, rows=[0, 0, 2], positions=[4, 5, 7], taps={"values": taps.tobytes()})
    return _device(), message


def _device():
    plugin = make_plugin("spa", "transformer")
    assert plugin.config.side == SIDES["transformer"]
    return Device(plugin.config, plugin.params["side"], "float32", rows=4, slots=40)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rows": [0, 2, 0]}, "rows .0, 2, 0. at positions .4, 5, 7. make no sense"),
        ({"positions": [5, 4, 7]}, "make no sense"),
        ({"positions": [4, 4, 7]}, "make no sense"),
        ({"rows": [0, 0, 4]}, "make no sense"),
        ({"rows": [0, 0, 2**31]}, "make no sense"),
        ({"positions": [4, 5, 40]}, "make no sense"),
        ({"positions": [4, 5]}, "make no sense"),
        ({"rows": [0, 0]}, r"1152 bytes .* \(2, 3, 32\) has 768"),
        ({"rows": [], "positions": [], "taps": {}}, "make no sense"),
        ({"origins": [0, 1, 2]}, "descend from .0, 1, 2., and there are 4"),
        ({"origins": [0, 1, 2, 4]}, "descend from"),
        ({"base": 3}, r"step 1 builds upon step 3, and this device keeps \[0\]"),
        ({"taps": {"values": np.full((3, 3, 32), np.nan, np.float32).tobytes()}}, "not finite"),
    ],
)
def test_a_message_that_makes_no_sense_is_refused_and_changes_nothing(wrong, says, question):
    device, message = question
    fields = {descriptor.name: value for descriptor, value in message.ListFields()}
    with pytest.raises(WireError, match=says):
        device.receive(Taps(**(fields | wrong)))
    assert device.receive(message) == _device().receive(message)


@pytest.mark.parametrize("kind", ["tokenwise", "transformer"])
@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("step", [0, 1], ids=["token", "prompt"])
def test_taps_so_large_that_no_answer_is_finite_are_refused_and_change_nothing(kind, codec, step):
    def device():
        plugin = make_plugin("spa", kind)
        return Device(plugin.config, plugin.params["side"], codec, rows=4, slots=40)

    def question(taps):
        packed = wire.pack(wire.encode(codec, taps))
        return Taps(step=1, rows=[0, 0, 2], positions=[4, 5, 7], taps=packed, prompt=bool(step))

    taps = np.random.default_rng(0).standard_normal((3, 3, 32)).astype(np.float32)
    one = device()
    huge = question(np.float32(3e38) * np.sign(taps))
    if codec == "float16":  # has no numbers so large
        assert wire.unpack(codec, one.receive(huge).g, (3 if step else 2, 32))
        return
    with pytest.raises(WireError, match="the cloud's taps give an answer that is not finite"):
        one.receive(huge)
    assert one.receive(question(taps)) == device().receive(question(taps))


def test_a_head_gives_no_token_for_numbers_that_are_not_finite():
    plugin, head = make_plugin("s1"), wire.encode("float32", np.full((97, 32), 4, np.float32))
    choice = TokenChoice(head, GREEDY, 0, np.array([3, 3, 3, 3], np.int32))
    device = Device(plugin.config, plugin.params["side"], "float32", 4, 40, "s1", choice)
    f, taps = np.full((1, 32), 1, np.float32), np.zeros((1, 3, 32), np.float32)
    for size in (1, 3e38):
        message = Taps(step=1, rows=[1], positions=[4], taps={"values": taps.tobytes()})
        message.f.values = (np.float32(size) * f).tobytes()
        if size == 1:
            assert len(device.receive(message).tokens) == 1
        else:
            with pytest.raises(WireError, match="not finite"):
                device.receive(message)


def test_a_message_has_no_more_positions_of_a_row_than_the_generation_can_need():
    plugin = make_plugin("spa", "transformer")
    request = open_message(plugin, PROMPTS, NEW)
    lengths = list(map(len, PROMPTS))
    device = device_for(plugin, request, lengths)
    assert device._most == CHUNK_POSITIONS
    device = Device(plugin.config, plugin.params["side"], "float32", 4, 40, most=2)
    taps = np.zeros((3, 3, 32), np.float32)
    message = Taps(step=1, rows=[0, 0, 0], positions=[1, 2, 3], taps={"values": taps.tobytes()})
    with pytest.raises(WireError, match="taps of 3 positions of one row came, where there are 2"):
        device.receive(message)


@pytest.mark.parametrize(
    ("prompt", "length", "can_be"),
    [
        ([1, 2, 3], 3, True), ([1, 2, 3], 2, False), ([1, 2, 3], 4, False), ("Hi", 1, True), ("Hi", 40, True),
        ("Hi", 0, False), ("Hi", 2**13, False), ("Hi" * 4096, 2**13, True), ("Hi" * 10**6, 2**17 + 1, False),
    ],
    ids=lambda value: str(value)[:9],
)  # fmt: skip
def test_a_prompt_has_as_many_tokens_as_it_can_have(prompt, length, can_be):
    request = open_message(make_plugin("spa"), [prompt], 1)
    if can_be:
        device_for(make_plugin("spa"), request, [length])
    else:
        with pytest.raises(WireError, match=rf"counts \[{length}\] tokens in 1 prompts"):
            device_for(make_plugin("spa"), request, [length])


def test_a_wrong_answer_is_refused_and_the_right_one_still_taken(cloud):
    plugin, request = _request("tokenwise", None)
    device = Device(plugin.config, plugin.params["side"], "float32", 4, CHUNK_POSITIONS)
    session = cloud.open(request)
    right = device.receive(session.next_question())
    for wrong, says in [
        (Reply(step=7, g=right.g), "step 7 came where one of step 1 is due"),
        (Reply(step=1, g={"values": right.g.values[4:]}), "bytes"),
        (Reply(step=1, g={"values": b"\xff" * len(right.g.values)}), "not finite"),
    ]:
        with pytest.raises(WireError, match=says):
            session.apply_reply(wrong)
    session.apply_reply(right)
    while (question := session.next_question()) is not None:
        session.apply_reply(device.receive(question))
    assert session.result() == generate(cloud, plugin, request).generations
    assert session.degraded == 0
