"""The device's side of opening a generation: the request it sends, and the `Device` that answers for it."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from spa_jax.chat import DATE
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import GREEDY, Sampling
from spa_jax.decoding.settings import resolve_setting
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, Setting
from spa_jax.split import wire
from spa_jax.split.device import Device, TokenChoice
from spa_jax.split.head import Head
from spa_jax.split.messages_pb2 import Beams as BeamsMessage
from spa_jax.split.messages_pb2 import Open, Prompt
from spa_jax.split.messages_pb2 import Sampling as SamplingMessage
from spa_jax.split.wire import ReplyMode
from spa_jax.weights.plugin import Plugin

MAX_PROMPT_LENGTH = 2**17
"""Most tokens of a prompt for which a device will allocate a cache."""


def open_message(
    plugin: Plugin,
    prompts: Sequence[Sequence[int] | str],
    max_new_tokens: int,
    codec: str = "float32",
    setting: Setting | None = None,
    threshold: float | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    beams: Beams | None = None,
    reply: ReplyMode = "correction",
) -> Open:
    """Makes the message that opens a generation; no side parameter is in it.

    Args:
        plugin: of this device.
        prompts: token ids, or texts that the cloud is to tokenise.
        max_new_tokens: most new tokens of each prompt.
        codec: how numbers travel.
        setting: by default the plugin's own.
        threshold: p(consult) above which the device is asked; by default the plugin's own.
        sampling: how to sample.
        seed: of sampling.
        beams: how to search; None to sample.
        reply: what the device answers with.

    Raises:
        UserError: the plugin cannot run in that setting, a value out of range, or replies of tokens in a beam search or
            of a plugin that enters in front of a block.
    """
    config = plugin.config
    wire.check_reply(reply, beams is not None, config.entry)
    runs_as, threshold = resolve_setting(config, setting, threshold)
    router = plugin.params["router"] if runs_as in ROUTED else {}
    kernel, offset = (
        np.asarray(router[name], "<f4").tobytes() if name in router else b"" for name in ("kernel", "offset")
    )
    try:
        return Open(
            version=wire.VERSION,
            backbone=plugin.fingerprint,
            setting=runs_as,
            threshold=threshold,
            router=kernel,
            offset=offset,
            taps=config.side.taps,
            codec=wire.check_codec(codec),
            attends=config.side.attends and runs_as != "base",
            prompts=[Prompt(text=p) if isinstance(p, str) else Prompt(tokens=p) for p in prompts],
            template=plugin.template,
            date="" if plugin.date == DATE else plugin.date,
            reply=reply,
            entry=None if config.entry == "head" else config.entry,
            edits=config.edits,
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


def num_hypotheses(request: Open) -> int:
    """Returns the hypotheses of each prompt, K."""
    return request.beams.width if request.HasField("beams") else 1


def device_for(plugin: Plugin, request: Open, lengths: Sequence[int], head: Head | None = None) -> Device:
    """Makes the device's half of the generation that a request opened.

    Args:
        plugin: has the side network.
        request: what the device asked the cloud for.
        lengths: tokens of each prompt, as the cloud counts them.
        head: the LM head, for reply mode `token`.

    Raises:
        UserError: that mode without a head.
        WireError: lengths that these prompts cannot have.
    """
    if len(lengths) != len(request.prompts) or not all(0 < length <= MAX_PROMPT_LENGTH for length in lengths):
        raise wire.WireError(f"the cloud counts {list(lengths)[:8]} tokens in {len(request.prompts)} prompts")
    rows = len(request.prompts) * num_hypotheses(request)
    slots = max(lengths) + request.max_new_tokens
    choice = None
    if request.reply == "token":
        if head is None:
            raise UserError("reply mode 'token' needs the LM head on the device: name its file with --head")
        s = request.sampling
        choice = TokenChoice(head, Sampling(s.temperature, s.top_k, s.top_p), s.seed, np.array(lengths, np.int32))
    codec, setting = wire.check_codec(request.codec), cast(Setting, request.setting)
    return Device(plugin.config, plugin.params["side"], codec, rows, slots, setting, choice)
