"""The device, which answers one prompt, a conversation on the terminal, or programs that speak HTTP."""

import asyncio
import functools
import sys
from pathlib import Path
from typing import cast

from spa_jax import compilation_cache
from spa_jax.answer_flags import (
    CODEC,
    MAX_NEW_TOKENS,
    OUTPUT,
    PROMPT,
    READS_SPECIAL,
    REPLY,
    SEED,
    read_beams,
    read_mode,
    read_sampling,
)
from spa_jax.choices import ReplyMode
from spa_jax.conversation import Conversation
from spa_jax.endpoint.app import Endpoint
from spa_jax.endpoint.listener import listen
from spa_jax.endpoint.requests import Defaults
from spa_jax.endpoint.server import load_plugins, serve
from spa_jax.files import write_json
from spa_jax.printer import Printer
from spa_jax.serve.device_flags import HEAD, HTTP, HTTP_KEY_FILE, PLUGIN, read_connection
from spa_jax.split.channel import describe_opening
from spa_jax.split.client import RemoteResult, generate
from spa_jax.split.connection import Connection, read_token
from spa_jax.split.head import Head, load_head
from spa_jax.split.messages_pb2 import Progress
from spa_jax.split.refusals import SessionLost
from spa_jax.split.request import open_message
from spa_jax.split.wire import check_codec, check_reply
from spa_jax.terminal import Mode, converse
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.plugin import Plugin, load_plugin


def main() -> None:
    """Answers one prompt, what is typed in, or programs that speak HTTP."""
    compilation_cache.keep_programs()
    if HTTP.value:
        run_endpoint()
        return
    plugin = load_plugin(plugin_directory(PLUGIN.value[0]))
    head = None
    check_reply(REPLY.value, False, plugin.config.entry)
    if REPLY.value == "token":
        head = load_head(Path(cast(str, HEAD.value)), plugin.fingerprint, plugin.config.hidden_size)
    connection, mode = read_connection(), read_mode()
    if PROMPT.value is not None:
        ask(plugin, head, connection, Conversation().asked(PROMPT.value), mode)
        return
    converse(functools.partial(ask_on, plugin, head, connection), mode)


def ask(
    plugin: Plugin, head: Head | None, connection: Connection, talk: Conversation, mode: Mode
) -> tuple[str, list[int]]:
    """Prints the answer to a conversation as it comes, and returns its text and tokens."""
    printer, num_printed = Printer(), 0

    def print_new(progress: Progress) -> None:
        nonlocal num_printed
        (answer,) = progress.generated
        for text, consulted in zip(answer.pieces[num_printed:], answer.consulted[num_printed:]):
            printer.add(text, consulted)
        num_printed = len(answer.pieces)

    request = open_message(
        plugin,
        [talk],
        MAX_NEW_TOKENS.value,
        check_codec(CODEC.value),
        setting=mode.setting,
        threshold=mode.threshold,
        sampling=read_sampling(),
        seed=SEED.value,
        beams=read_beams(),
        reply=cast(ReplyMode, REPLY.value),
        reads_special=READS_SPECIAL.value,
    )
    try:
        result: RemoteResult = asyncio.run(generate(connection, plugin, request, print_new, head, printer.wait))
    finally:
        printer.finish()
    (generation,), traffic = result.generations, result.traffic
    opening = describe_opening(traffic.opening_exchanges, 0, result.uncorrected_prompts)
    print(
        f"{len(generation.tokens)} tokens, consulted share {generation.consulted_share:.2f}; {traffic.exchanges} "
        f"exchanges, {traffic.bytes_down:,} bytes down and {traffic.bytes_up:,} up, {result.degraded} tokens "
        f"degraded{opening} (tokens from the plugin {printer.style_description})"
    )
    if OUTPUT.value:
        described = {
            "prompt": talk.turns[-1][0].content,
            "text": result.texts[0],
            "tokens": generation.tokens,
            "sources": ["device" if consulted else "cloud" for consulted in generation.consulted],
            "exchanges": traffic.exchanges,
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
            "prefill_bytes": traffic.prefill_bytes,
            "degraded": result.degraded,
            "opening_exchanges": traffic.opening_exchanges,
            "uncorrected_prompts": result.uncorrected_prompts,
            "device_seconds": traffic.device_seconds,
        }
        write_json(Path(OUTPUT.value), described)
    return result.texts[0], generation.tokens


def ask_on(
    plugin: Plugin, head: Head | None, connection: Connection, talk: Conversation, mode: Mode
) -> tuple[str, list[int]]:
    """Asks as `ask` does, and once more where the cloud has forgotten the answer that it was about to give."""
    try:
        return ask(plugin, head, connection, talk, mode)
    except SessionLost:
        print("the cloud has lost this answer: asking again", file=sys.stderr)
        return ask(plugin, head, connection, talk, mode)


def run_endpoint() -> None:
    """Answers programs that speak HTTP, until a signal."""
    key, connection = read_token(HTTP_KEY_FILE.value), read_connection()
    with listen(HTTP.value, bool(key)) as listener:
        defaults = Defaults(MAX_NEW_TOKENS.value, read_sampling(), SEED.value, read_mode())
        serve(Endpoint(load_plugins(PLUGIN.value), connection, defaults, key).check(), listener)
