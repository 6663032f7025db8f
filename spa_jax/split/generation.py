"""A generation by cloud and device in one process, over a channel."""

import dataclasses
import time
from collections.abc import Callable

from spa_jax.decoding.hypotheses import Generation
from spa_jax.split import wire
from spa_jax.split.channel import Answer, Channel, InProcess, Traffic
from spa_jax.split.head import Head
from spa_jax.split.messages_pb2 import Open, Reply, Taps
from spa_jax.split.request import device_for
from spa_jax.split.session import Cloud
from spa_jax.weights.plugin import Plugin

Connect = Callable[[Answer], Channel]
"""Makes a channel to a device that answers so."""


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """The generations of a request, and what they cost.

    Attributes:
        generations: one for each prompt.
        traffic: exchanges, bytes, and time on the network and in the device.
        degraded: tokens that were chosen without the reply they waited for.
        uncorrected_prompts: prompts that were to be corrected, and were not for want of a reply.
        cloud_seconds: time in the cloud's programs.
    """

    generations: list[Generation]
    traffic: Traffic
    degraded: int
    uncorrected_prompts: int
    cloud_seconds: float


def generate(
    cloud: Cloud, plugin: Plugin, request: Open, connect: Connect = InProcess, head: Head | None = None
) -> SplitResult:
    """Runs both halves of a generation; a reply that makes no sense is treated as lost.

    Args:
        cloud: has the backbone.
        plugin: of the device.
        request: made by `open_message` for that plugin.
        connect: makes the channel.
        head: the device's LM head, for reply mode `token`.

    Raises:
        UserError: the cloud refuses the request.
    """
    began = time.perf_counter()
    session = cloud.open(request)
    channel_seconds = 0.0
    device = device_for(plugin, request, session.lengths, head)

    def answer(message: bytes) -> bytes | None:
        reply = device.receive(wire.parse(Taps, message))
        return None if reply is None else reply.SerializeToString()

    channel = connect(answer)
    channel.traffic.prefill_bytes += request.ByteSize()
    opening = True
    while True:
        for message in session.prompt_messages():
            sent_at = time.perf_counter()
            channel.send(message.SerializeToString())
            channel_seconds += time.perf_counter() - sent_at
        question = session.next_question()
        if opening and (question is None or not question.prompt):
            channel.traffic.end_opening()
            opening = False
        if question is None:
            break
        sent_at = time.perf_counter()
        reply = channel.exchange(question.SerializeToString())
        channel_seconds += time.perf_counter() - sent_at
        try:
            session.apply_reply(None if reply is None else wire.parse(Reply, reply))
        except wire.WireError:
            session.apply_reply(None)
    generations = session.result()
    cloud.engine.drop_finished()
    cloud_seconds = time.perf_counter() - began - channel_seconds
    return SplitResult(generations, channel.traffic, session.degraded, session.uncorrected_prompts, cloud_seconds)
