"""The device's side of opening a generation: the request it sends, and the `Device` that answers for it."""

import hashlib
import itertools
import json
import secrets
from collections.abc import Sequence
from typing import cast

import numpy as np

from spa_jax.chat import DATE
from spa_jax.conversation import Beginning, Conversation
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import GREEDY, NO_PENALTIES, Penalties, Sampling
from spa_jax.decoding.settings import resolve_setting
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, Setting
from spa_jax.split import wire
from spa_jax.split.device import Device, TokenChoice
from spa_jax.split.head import Head
from spa_jax.split.messages_pb2 import Beams as BeamsMessage
from spa_jax.split.messages_pb2 import ChatMessage, Open, Prompt
from spa_jax.split.messages_pb2 import Sampling as SamplingMessage
from spa_jax.split.wire import ReplyMode
from spa_jax.weights.plugin import Plugin

AnyPrompt = Sequence[int] | str | Conversation | Beginning
MAX_PROMPT_LENGTH = 2**17
"""Most tokens of a prompt for which a device will allocate a cache."""
PREFIX_CHARACTERS, PREFIX_TOKENS = 256, 64
"""How much of a prompt its digest is made of: about what a cloud keeps of prompts as one piece."""
MAX_TEMPLATE_LENGTH, MAX_TOKENS_PER_BYTE = 2**12, 4
"""Most tokens that a cloud may add to a text by its template, and may make of a byte of it (a tokenizer makes one at
most, of what normalising a character leaves)."""


def open_message(
    plugin: Plugin,
    prompts: Sequence[AnyPrompt],
    max_new_tokens: int,
    codec: str = "float32",
    setting: Setting | None = None,
    threshold: float | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    beams: Beams | None = None,
    reply: ReplyMode = "correction",
    penalties: Penalties = NO_PENALTIES,
    stop: Sequence[str] = (),
    scored: bool = False,
    reads_special: bool = False,
) -> Open:
    """Makes the message that opens a generation; no side parameter is in it.

    Args:
        plugin: of this device.
        prompts: token ids; or questions, conversations that end in one, or beginnings, for the cloud to tokenise.
        max_new_tokens: most new tokens of each prompt.
        codec: how numbers travel.
        setting: by default the plugin's own.
        threshold: p(consult) above which the device is asked; by default the plugin's own.
        sampling: how to sample.
        seed: of sampling.
        beams: how to search; None to sample.
        reply: what the device answers with.
        penalties: of tokens that an answer has already.
        stop: texts in front of which an answer ends.
        scored: whether to be told how likely each token was.
        reads_special: whether names of special tokens in texts, such as `<|im_end|>`, are these tokens and not text.

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
            prompts=[_prompt(prompt) for prompt in prompts],
            template=plugin.template,
            date="" if plugin.date == DATE else plugin.date,
            reply=reply,
            entry=None if config.entry == "head" else config.entry,
            edits=config.edits,
            stop=stop,
            scored=scored,
            reads_special=reads_special,
            own=_secret(plugin) if config.edits == "all" else b"",
            max_new_tokens=max_new_tokens,
            sampling=SamplingMessage(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=seed,
                frequency_penalty=penalties.frequency,
                presence_penalty=penalties.presence,
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


def _secret(plugin: Plugin) -> bytes:
    """Makes what nobody else can know of this process and the side network."""
    return hashlib.blake2b(bytes.fromhex(plugin.digest), key=_KEY, digest_size=16).digest()


_KEY = secrets.token_bytes(32)


def _prompt(prompt: AnyPrompt) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, Beginning):
        return Prompt(text=prompt.text, raw=True)
    if isinstance(prompt, Conversation):
        turns = prompt.turns
        return Prompt(messages=[ChatMessage(role=t.role, content=t.content, tokens=ids) for t, ids in turns])
    return Prompt(tokens=prompt)


def prefix_digest(request: Open) -> str:
    """Computes 16 bits, as hexadecimal digits, of what the first prompt begins with.

    They are alike for prompts that begin alike, such as those of a conversation, and so few that most texts in the
    world share them with others.
    """
    (prompt,) = request.prompts[:1] or [Prompt()]
    opening = itertools.takewhile(lambda message: message.role != "assistant", prompt.messages)
    text = prompt.text + "".join(message.content + "\n" for message in opening)
    begin = [text[:PREFIX_CHARACTERS], list(prompt.tokens[:PREFIX_TOKENS])]
    return hashlib.blake2b(json.dumps(begin).encode(), digest_size=2).hexdigest()


def num_hypotheses(request: Open) -> int:
    """Returns the hypotheses of each prompt, K."""
    return request.beams.width if request.HasField("beams") else 1


def num_rows(request: Open) -> int:
    """Returns the rows of a generation, R: the hypotheses of all prompts."""
    return len(request.prompts) * num_hypotheses(request)


def can_have(prompt: Prompt, length: int) -> bool:
    """Says whether a prompt can have so many tokens."""
    if prompt.tokens and not prompt.text:
        return length == len(prompt.tokens)
    return 0 < length <= min(MAX_TEMPLATE_LENGTH + MAX_TOKENS_PER_BYTE * prompt.ByteSize(), MAX_PROMPT_LENGTH)


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
    if len(lengths) != len(request.prompts) or not all(map(can_have, request.prompts, lengths)):
        raise wire.WireError(f"the cloud counts {list(lengths)[:8]} tokens in {len(request.prompts)} prompts")
    rows, most = num_rows(request), max(wire.CHUNK_POSITIONS, request.max_new_tokens + 1)
    slots = max(lengths) + request.max_new_tokens
    choice = None
    if request.reply == "token":
        if head is None:
            raise UserError("reply mode 'token' needs the LM head on the device: name its file with --head")
        s = request.sampling
        choice = TokenChoice(head, Sampling(s.temperature, s.top_k, s.top_p), s.seed, np.array(lengths, np.int32))
    codec, setting = wire.check_codec(request.codec), cast(Setting, request.setting)
    return Device(plugin.config, plugin.params["side"], codec, rows, slots, setting, choice, most)
