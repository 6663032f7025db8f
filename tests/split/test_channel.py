"""Counts of a channel, and a simulated network against closed forms."""

import dataclasses
import time

import pytest
from tiny_split import NEW, make_plugin, make_prompts

from spa_jax.decoding.beam import Beams
from spa_jax.errors import UserError
from spa_jax.split.channel import InProcess, Traffic
from spa_jax.split.generation import generate
from spa_jax.split.request import open_message
from spa_jax.split.simulated import Network, Simulated

PERFECT = Network(tau=0.01, down=1e6, up=2e5, deadline=1e9)


def _echo(message):
    """Answers a tenth of the bytes."""
    return message[: len(message) // 10]


@pytest.mark.parametrize("connect", [InProcess, lambda answer: Simulated(answer, PERFECT)], ids=["here", "simulated"])
@pytest.mark.parametrize(("kind", "width"), [("tokenwise", None), ("transformer", 4)])
def test_traffic_is_the_messages_that_were_serialised(kind, width, connect, cloud):
    plugin, beams, crossed = make_plugin("spa", kind), Beams(width) if width else None, []

    def listen(answer):
        def heard(message):
            reply = answer(message)
            crossed.append((len(message), None if reply is None else len(reply)))
            return reply

        return connect(heard)

    request = open_message(plugin, make_prompts(9), NEW, beams=beams)
    traffic = generate(cloud, plugin, request, listen).traffic
    questions = [down for down, up in crossed if up is not None]
    assert traffic.exchanges == len(questions) > 0
    assert traffic.lost == 0
    assert traffic.bytes_down == sum(questions)
    assert traffic.bytes_up == sum(up for _, up in crossed if up is not None)
    brought = [down for down, up in crossed if up is None]
    assert bool(brought) == (kind == "transformer")
    assert traffic.prefill_bytes == len(request.SerializeToString()) + sum(brought)
    assert traffic.device_seconds > 0


def test_without_jitter_the_clock_shows_latency_and_bits_over_bandwidth():
    channel = Simulated(_echo, PERFECT)
    sizes = [1000, 20, 64_000]
    for size in sizes:
        assert channel.exchange(b"x" * size) == b"x" * (size // 10)
    expected = sum(0.01 + 8 * size / 1e6 + 8 * (size // 10) / 2e5 for size in sizes)
    assert channel.traffic.network_seconds == pytest.approx(expected)
    channel.send(b"x" * 500)
    assert channel.traffic.network_seconds == pytest.approx(expected + 0.01 / 2 + 8 * 500 / 1e6)
    seconds = {"network_seconds": 0.0, "device_seconds": 0.0}
    assert dataclasses.replace(channel.traffic, **seconds) == Traffic(3, 0, sum(sizes), 6502, 500)


def test_an_hour_of_network_takes_no_time():
    began = time.perf_counter()
    channel = Simulated(_echo, dataclasses.replace(PERFECT, tau=36.0))
    for _ in range(100):
        channel.exchange(b"")
    assert channel.traffic.network_seconds == pytest.approx(3600)
    assert time.perf_counter() - began < 1


def test_jitter_delays_each_message_by_its_mean():
    """400 exchanges of two messages, whose delays have a standard error of 3.5 % of their mean."""
    channel = Simulated(_echo, dataclasses.replace(PERFECT, jitter=0.5))
    for _ in range(400):
        channel.exchange(b"")
    assert channel.traffic.network_seconds / 400 - 0.01 == pytest.approx(2 * 0.5, rel=0.12)


def test_a_question_or_an_answer_may_be_lost():
    """An exchange is lost with probability 1 - 0.8 ** 2; 2000 of them are off by 0.01."""
    network, reached = dataclasses.replace(PERFECT, loss=0.2, deadline=3.0), []
    channel = Simulated(lambda message: reached.append(message) or b"", network)
    replies = [channel.exchange(b"question") for _ in range(2000)]
    assert replies.count(None) == channel.traffic.lost
    assert channel.traffic.lost / 2000 == pytest.approx(0.36, abs=0.04)
    assert len(reached) / 2000 == pytest.approx(0.8, abs=0.04)
    assert channel.traffic.exchanges == 2000
    arrived = 2000 - channel.traffic.lost
    assert channel.traffic.network_seconds == pytest.approx(3.0 * channel.traffic.lost + arrived * (0.01 + 64 / 1e6))


def test_a_device_that_answers_nothing_is_lost_once():
    for channel in (InProcess(lambda message: None), Simulated(lambda message: None, PERFECT)):
        assert channel.exchange(b"question") is None
        assert (channel.traffic.exchanges, channel.traffic.lost, channel.traffic.bytes_up) == (1, 1, 0)


def test_a_part_of_the_prompt_is_sent_until_it_arrives():
    reached = []
    channel = Simulated(reached.append, dataclasses.replace(PERFECT, loss=0.5, tau=1.0, down=1e12))
    for _ in range(500):
        channel.send(b"part")
    assert len(reached) == 500
    assert channel.traffic.prefill_bytes == 500 * 4
    assert channel.traffic.network_seconds / 500 == pytest.approx(0.5 + 1.5, rel=0.2)


def test_an_answer_past_the_deadline_does_not_come():
    channel = Simulated(_echo, dataclasses.replace(PERFECT, deadline=0.02))
    assert channel.exchange(b"x" * 100) is not None
    assert channel.exchange(b"x" * 2000) is None
    assert (channel.traffic.exchanges, channel.traffic.lost) == (2, 1)
    assert channel.traffic.network_seconds == pytest.approx(0.01 + 800 / 1e6 + 80 / 2e5 + 0.02)


def test_a_seed_gives_the_same_network_and_another_does_not():
    network = Network(jitter=0.3, loss=0.3, deadline=0.8)

    def run(seed):
        channel = Simulated(_echo, dataclasses.replace(network, seed=seed))
        return [channel.exchange(b"x" * 50) is None for _ in range(60)], channel.traffic.network_seconds

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(("kind", "width"), [("tokenwise", None), ("transformer", 4)])
def test_a_generation_over_a_lossy_network_ends(kind, width, cloud):
    plugin, beams = make_plugin("spa", kind), Beams(width) if width else None
    request = open_message(plugin, make_prompts(9)[:1] * 4, NEW, threshold=0.2, beams=beams)
    lossy = Network(loss=0.3, jitter=0.01, deadline=0.1)
    first, again = (generate(cloud, plugin, request, lambda answer: Simulated(answer, lossy)) for _ in range(2))
    assert first.generations == again.generations
    assert first.traffic.network_seconds == again.traffic.network_seconds
    assert 0 < first.traffic.lost < first.traffic.exchanges
    assert first.degraded == 4 * first.traffic.lost


@pytest.mark.parametrize(
    "bad",
    [
        {"tau": -1.0}, {"tau": float("nan")}, {"jitter": -0.1}, {"jitter": float("nan")}, {"down": 0.0}, {"up": -1.0},
        {"up": float("nan")}, {"deadline": 0.0}, {"loss": -0.1}, {"loss": 1.0}, {"loss": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_a_network_that_makes_no_sense_is_refused(bad):
    with pytest.raises(UserError, match="makes no sense"):
        Network(**bad)
