"""A generation by cloud and device: the device opens it, and answers what the cloud asks until it is over."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import check_threshold
from spa_jax.decoding.hypotheses import Generation
from spa_jax.decoding.sampling import GREEDY, Sampling
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, Setting
from spa_jax.split import wire
from spa_jax.split.channel import Answer, Channel, InProcess, Traffic
from spa_jax.split.device import Choice, Device
from spa_jax.split.head import Head
from spa_jax.split.messages_pb2 import Beams as BeamsMessage
from spa_jax.split.messages_pb2 import Open, Prompt, Reply, Taps
from spa_jax.split.messages_pb2 import Sampling as SamplingMessage
from spa_jax.split.session import Cloud
from spa_jax.split.wire import Codec, ReplyMode
from spa_jax.weights.plugin import Plugin

LONGEST_PROMPT = 2**17
"""Tokens for which a device will make room."""
Connect = Callable[[Answer], Channel]
"""Makes a channel to a device that answers so."""


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """What was generated, and what it cost.

    Attributes:
        generations: of each prompt.
        traffic: exchanges, bytes, and time on the network and in the device.
        degraded: how often a prompt's next token was chosen without an answer that was wanted.
        cloud_seconds: time in the cloud's programs.
    """

    generations: list[Generation]
    traffic: Traffic
    degraded: int
    cloud_seconds: float


def open_message(
    plugin: Plugin,
    prompts: Sequence[Sequence[int] | str],
    max_new_tokens: int,
    codec: Codec = "float32",
    setting: Setting | None = None,
    threshold: float | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    beams: Beams | None = None,
    reply: ReplyMode = "correction",
) -> Open:
    """What the device tells the cloud: no side parameter is in it.

    Raises:
        UserError: the plugin cannot run in that setting, a value out of range, or beam search with replies of tokens.
    """
    config = plugin.config
    wire.check_reply(reply, beams is not None)
    setting, threshold = check_threshold(config, setting, threshold)
    router = plugin.params["router"] if setting in ROUTED else {}
    kernel, offset = (
        np.asarray(router[name], "<f4").tobytes() if name in router else b"" for name in ("kernel", "offset")
    )
    try:
        return Open(
            version=wire.VERSION,
            backbone=plugin.fingerprint,
            setting=setting,
            threshold=threshold,
            router=kernel,
            offset=offset,
            taps=config.side.taps,
            codec=wire.check_codec(codec),
            attends=config.side.attends and setting != "base",
            prompts=[Prompt(text=p) if isinstance(p, str) else Prompt(tokens=p) for p in prompts],
            template=plugin.template,
            reply=reply,
            max_new_tokens=max_new_tokens,
            sampling=SamplingMessage(
                temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=seed
            ),
            beams=None
            if beams is None
            else BeamsMessage(
                width=beams.width,
                length_penalty=beams.length_penalty,
                early_stopping=str(beams.early_stopping).lower(),
            ),
        )
    except ValueError as error:
        raise UserError(f"the cloud cannot be asked for that: {error}") from error


def hypotheses_of(request: Open) -> int:
    """K, the hypotheses of each prompt."""
    return request.beams.width if request.HasField("beams") else 1


def device_for(plugin: Plugin, request: Open, lengths: Sequence[int], head: Head | None = None) -> Device:
    """The device's half of the generation it opens.

    Args:
        plugin: has the side network.
        request: what it asked the cloud for.
        lengths: tokens of each prompt, as the cloud counts them.
        head: the LM head, of reply mode `token`.

    Raises:
        UserError: that mode without a head.
        WireError: lengths that these prompts cannot have.
    """
    if len(lengths) != len(request.prompts) or not all(0 < length <= LONGEST_PROMPT for length in lengths):
        raise wire.WireError(f"the cloud counts {list(lengths)[:8]} tokens in {len(request.prompts)} prompts")
    rows = len(request.prompts) * hypotheses_of(request)
    slots = max(lengths) + request.max_new_tokens
    choice = None
    if request.reply == "token":
        if head is None:
            raise UserError("reply mode 'token' needs the LM head on the device: name its file with --head")
        s = request.sampling
        choice = Choice(head, Sampling(s.temperature, s.top_k, s.top_p), s.seed, np.array(lengths, np.int32))
    codec, setting = wire.check_codec(request.codec), cast(Setting, request.setting)
    return Device(plugin.config, plugin.params["side"], codec, rows, slots, setting, choice)


def generate(
    cloud: Cloud, plugin: Plugin, request: Open, connect: Connect = InProcess, head: Head | None = None
) -> SplitResult:
    """Generates over a channel, both halves in this process; an answer that makes no sense is done without.

    Raises:
        UserError: the cloud refuses the request.
    """
    began = time.perf_counter()
    session = cloud.open(request)
    elsewhere = 0.0
    device = device_for(plugin, request, session.lengths, head)

    def answer(message: bytes) -> bytes | None:
        reply = device.receive(wire.parse(Taps, message))
        return None if reply is None else reply.SerializeToString()

    channel = connect(answer)
    channel.traffic.prefill_bytes += request.ByteSize()
    for message in session.prompt_messages():
        at = time.perf_counter()
        channel.send(message.SerializeToString())
        elsewhere += time.perf_counter() - at
    while (question := session.wanted()) is not None:
        at = time.perf_counter()
        reply = channel.exchange(question.SerializeToString())
        elsewhere += time.perf_counter() - at
        try:
            session.resume(None if reply is None else wire.parse(Reply, reply))
        except wire.WireError:
            session.resume(None)
    result = session.result()
    seconds = time.perf_counter() - began - elsewhere
    return SplitResult(result, channel.traffic, session.degraded, seconds)
