"""Generate with a plugin: python -m spa_jax.generate --plugin=DIR/plugin --prompt="..." (or --interactive).

--channel=none runs everything as one program. The others run cloud and device as two, which exchange messages, and say
what that cost: in-process and simulated in this process, grpc in two. Tokens for which the device was asked are
coloured, or [bracketed] where the output is no terminal.
"""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from absl import flags

from spa_jax import answer_flags, command, compilation_cache
from spa_jax.answer_flags import (
    CODEC,
    INTERACTIVE,
    MAX_NEW_TOKENS,
    OUTPUT,
    PROMPT,
    READS_SPECIAL,
    REPLY,
    SEED,
    SETTING,
    THRESHOLD,
    read_beams,
    read_connection,
    read_mode,
    read_sampling,
)
from spa_jax.choices import Codec, ReplyMode
from spa_jax.errors import UserError
from spa_jax.models.compute import WEIGHTS, Compute, Weights
from spa_jax.split.connection import Connection
from spa_jax.split.simulated import Network, Simulated

flags.adopt_module_key_flags(answer_flags)  # --help shows them
flags.adopt_module_key_flags(compilation_cache)
PLUGIN = flags.DEFINE_string("plugin", None, "Directory of a plugin, as a run leaves it, or its name on the hub.")
BACKBONE = flags.DEFINE_string("backbone", None, "Backbone by name, directory or .gguf file; the plugin's by default.")
PRECISION = flags.DEFINE_enum("weights", "float", WEIGHTS, "int8 keeps the backbone's matrices in 8 bits.")
CHANNEL = flags.DEFINE_enum("channel", "none", ["none", "in-process", "simulated", "grpc"], "Between cloud and device.")
HEAD = flags.DEFINE_string("head", None, "File of the device's LM head, for --reply=token; by default the backbone's.")
TAU = flags.DEFINE_float("tau", Network.tau, "Simulated: seconds of a round trip.")
DOWN = flags.DEFINE_float("down", Network.down, "Simulated: bits per second from cloud to device.")
UP = flags.DEFINE_float("up", Network.up, "Simulated: bits per second from device to cloud.")
JITTER = flags.DEFINE_float("jitter", Network.jitter, "Simulated: mean seconds of random delay a message.")
LOSS = flags.DEFINE_float("loss", Network.loss, "Simulated: probability that a message is lost.")
DEADLINE = flags.DEFINE_float("deadline", Network.deadline, "Simulated: seconds to wait for the device.")
CLOUD = flags.DEFINE_string("cloud", None, "grpc: host:port of a cloud; by default one is started on this machine.")


def network() -> Network:
    """Makes the simulated network of its flags.

    Raises:
        UserError: it makes no sense.
    """
    return Network(TAU.value, DOWN.value, UP.value, JITTER.value, LOSS.value, DEADLINE.value, SEED.value)


def check_flags() -> None:
    """Refuses flags that no model is needed to refuse.

    Raises:
        UserError: such a flag.
    """
    if (PROMPT.value is None) == (not INTERACTIVE.value):
        raise UserError("give either --prompt='...' or --interactive")
    answer_flags.check()
    if PLUGIN.value is None and BACKBONE.value is None:
        raise UserError("name a plugin with --plugin=DIR, or a backbone alone with --backbone=NAME")
    if CHANNEL.value == "none" and REPLY.value != "correction":
        raise UserError("--reply=token is what a device answers: name a --channel to reach one")
    if CHANNEL.value != "none" and PLUGIN.value is None:
        raise UserError(f"--channel={CHANNEL.value} leads to a device, which needs a plugin: name one with --plugin")
    if CHANNEL.value == "simulated":
        network()
    if CHANNEL.value == "grpc" and CLOUD.value is not None:
        read_connection(CLOUD.value)


if __name__ == "__main__":
    command.read_flags(check_flags)

from spa_jax.conversation import Conversation
from spa_jax.data.detokenizing import StreamingDetokenizer
from spa_jax.data.encoding import Encoder
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.encoders import prompt_encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import Sampling
from spa_jax.decoding.settings import resolve_setting
from spa_jax.files import write_json
from spa_jax.printer import Printer
from spa_jax.split import client
from spa_jax.split.channel import InProcess, describe_opening
from spa_jax.split.client import RemoteResult
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.generation import Connect, SplitResult, generate
from spa_jax.split.head import Head, head_of, load_head
from spa_jax.split.messages_pb2 import Generated, Open, Progress
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.terminal import Mode, converse
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.peft import PeftPlugin, load_trained
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

Tokens = Iterator[tuple[int, bool]]
"""Token ids as they come, each with whether the device was asked."""
GenerateTokens = Callable[[list[int], dict[str, Any]], Tokens]
"""Generates from the token ids of a prompt, and adds to a dictionary what passed between cloud and device."""


def generate_fused(
    model: FusedModel, sampling: Sampling, beams: Beams | None, prompt: list[int], cost: dict[str, Any]
) -> Tokens:
    """Generates by one program; there is no channel, so `cost` stays empty."""
    if beams is None:
        yield from model.stream(prompt, MAX_NEW_TOKENS.value, sampling, SEED.value)
        return
    (generation,) = model.generate([prompt], MAX_NEW_TOKENS.value, sampling, SEED.value, beams)
    yield from zip(generation.tokens, generation.consulted)


def generate_split(
    cloud: Cloud,
    plugin: Plugin,
    head: Head | None,
    connect: Connect,
    mode: Mode,
    sampling: Sampling,
    beams: Beams | None,
    prompt: list[int],
    cost: dict[str, Any],
) -> Tokens:
    """Generates by two programs in this process, and adds what passed between them to `cost`."""
    result = generate(cloud, plugin, request_for(plugin, mode, sampling, beams, prompt), connect, head)
    (generation,) = result.generations
    cost |= describe_cost(result, len(generation.tokens), result.cloud_seconds)
    yield from zip(generation.tokens, generation.consulted)


def request_for(plugin: Plugin, mode: Mode, sampling: Sampling, beams: Beams | None, prompt: list[int]) -> Open:
    """Makes the device's request to the cloud, by the flags."""
    return open_message(
        plugin,
        [prompt],
        MAX_NEW_TOKENS.value,
        cast(Codec, CODEC.value),
        mode.setting,
        mode.threshold,
        sampling,
        SEED.value,
        beams,
        cast(ReplyMode, REPLY.value),
    )


def head_for(plugin: Plugin, backbone: Backbone) -> Head | None:
    """Returns the device's LM head, by the flags; None if it needs none."""
    if REPLY.value != "token":
        return None
    return (
        load_head(Path(HEAD.value), plugin.fingerprint, plugin.config.hidden_size) if HEAD.value else head_of(backbone)
    )


def describe_cost(result: SplitResult | RemoteResult, tokens: int, cloud_seconds: float) -> dict[str, Any]:
    """Describes the traffic of a generation for `--output`."""
    traffic = result.traffic
    return {
        "exchanges": traffic.exchanges,
        "bytes_up": traffic.bytes_up,
        "bytes_down": traffic.bytes_down,
        "prefill_bytes": traffic.prefill_bytes,
        "ratio": traffic.exchanges / tokens,
        "degraded": result.degraded,
        "opening_exchanges": traffic.opening_exchanges,
        "opening_seconds": traffic.opening_seconds,
        "uncorrected_prompts": result.uncorrected_prompts,
        "cloud_seconds": cloud_seconds,
        "device_seconds": traffic.device_seconds,
        "network_seconds": traffic.network_seconds,
    }


def generate_remote(
    connection: Connection,
    plugin: Plugin,
    head: Head | None,
    mode: Mode,
    sampling: Sampling,
    beams: Beams | None,
    prompt: list[int],
    cost: dict[str, Any],
) -> Tokens:
    """Generates with a cloud in another process, and adds to `cost` what passed between them; the seconds of the cloud
    include those of the network."""
    request = request_for(plugin, mode, sampling, beams, prompt)
    began, came, count = time.perf_counter(), asyncio.Event(), 0
    answer = Generated()

    def take(progress: Progress) -> None:
        nonlocal answer
        (answer,) = progress.generated
        came.set()

    with asyncio.Runner() as runner:
        task = runner.get_loop().create_task(client.generate(connection, plugin, request, take, head))
        task.add_done_callback(lambda _: came.set())
        while not task.done():
            runner.run(came.wait())
            came.clear()
            yield from zip(answer.tokens[count:], answer.consulted[count:])
            count = len(answer.tokens)
        result = task.result()
    seconds = time.perf_counter() - began - result.traffic.device_seconds
    cost |= describe_cost(result, count, seconds)


LOCAL_CLOUD = contextlib.ExitStack()
"""Ends the cloud that `start_local_cloud` has started."""


def start_local_cloud(backbone: Backbone) -> str:
    """Starts a cloud on this machine, with a long deadline since no network can be slow, and returns its address."""
    options = (
        "--deadline=60",
        f"--weights={PRECISION.value}",
        f"--compilation_cache={compilation_cache.COMPILATION_CACHE.value}",
    )
    return LOCAL_CLOUD.enter_context(cloud_process(backbone.name, *options)).address


def answer(generate_tokens: GenerateTokens, encoder: Encoder, talk: Conversation) -> dict[str, Any]:
    """Prints the answer to a conversation as it comes, and returns it as `--output` writes it."""
    printer, stream = Printer(), StreamingDetokenizer(encoder.tokenizer)
    tokens: list[int] = []
    sources: list[str] = []
    cost: dict[str, Any] = {}
    unprinted = iter(sources)
    began = time.perf_counter()

    def print_texts(texts: list[str]) -> None:
        for text in texts:
            printer.add(text, next(unprinted) == "device")

    try:
        for token, consulted in generate_tokens(encoder.conversation(talk.turns), cost):
            tokens.append(token)
            sources.append("device" if consulted else "cloud")
            print_texts(stream.add(token))
    finally:
        print_texts(stream.finish())
        if tokens:
            printer.finish()
    share = sources.count("device") / len(sources)
    seconds = time.perf_counter() - began
    marked = f"tokens from the plugin {printer.style_description}"
    print(f"{len(tokens)} tokens in {seconds:.1f} s; consulted share {share:.2f} ({marked})")
    if cost:
        print(
            f"{cost['exchanges']} exchanges (ratio M {cost['ratio']:.2f}), {cost['bytes_down']:,} bytes down and "
            f"{cost['bytes_up']:,} up, {cost['prefill_bytes']:,} before the first; {cost['cloud_seconds']:.2f} s in "
            f"the cloud, {cost['device_seconds']:.2f} s in the device, {cost['network_seconds']:.2f} s on the network"
            + describe_opening(cost["opening_exchanges"], cost["opening_seconds"], cost["uncorrected_prompts"])
        )
    whole = encoder.tokenizer.decode(tokens, skip_special_tokens=True)
    prompt = talk.turns[-1][0].content
    return {"prompt": prompt, "text": whole, "tokens": tokens, "sources": sources, "consulted_share": share, **cost}


def make_generator(
    backbone: Backbone, plugin: Plugin | PeftPlugin | None, sampling: Sampling, beams: Beams | None
) -> Callable[[Mode], GenerateTokens]:
    """Makes the function that generates over the `--channel`, given a mode.

    Raises:
        UserError: the plugin is of another backbone, or its LM head cannot be read.
    """
    if CHANNEL.value == "none":
        models = functools.cache(lambda mode: FusedModel(backbone, plugin, mode.setting, mode.threshold))
        return lambda mode: functools.partial(generate_fused, models(mode), sampling, beams)
    plugin = cast(Plugin, plugin)
    plugin.check(backbone)
    head = head_for(plugin, backbone)
    if CHANNEL.value == "grpc":
        connection = read_connection(CLOUD.value or start_local_cloud(backbone))
        return lambda mode: functools.partial(generate_remote, connection, plugin, head, mode, sampling, beams)
    connect: Connect = InProcess
    if CHANNEL.value == "simulated":
        connect = functools.partial(Simulated, network=network())
    cloud = Cloud(backbone)
    return lambda mode: functools.partial(generate_split, cloud, plugin, head, connect, mode, sampling, beams)


def check_plugin(plugin: Plugin | PeftPlugin | None, sampling: Sampling, beams: Beams | None) -> None:
    """Refuses what a plugin cannot do, before a backbone is loaded.

    Raises:
        UserError: it cannot run in the setting or over the channel.
    """
    resolve_setting(plugin.config if plugin else None, SETTING.value, THRESHOLD.value)
    if CHANNEL.value == "none" or plugin is None:
        return
    if plugin.config.side is None:
        raise UserError(
            f"--channel={CHANNEL.value} leads to a side network, and a '{plugin.config.setting}' works within the "
            "backbone: use --channel=none (experiments.benchmarks.table2_network counts what its layers would exchange)"
        )
    request_for(cast(Plugin, plugin), read_mode(), sampling, beams, [0])


def main() -> None:
    compilation_cache.keep_programs()
    sampling, beams = read_sampling(), read_beams()
    plugin = load_trained(plugin_directory(PLUGIN.value)) if PLUGIN.value is not None else None
    check_plugin(plugin, sampling, beams)
    backbone = load_backbone(
        BACKBONE.value or (plugin.backbone if plugin else ""), compute=Compute(weights=cast(Weights, PRECISION.value))
    )
    with LOCAL_CLOUD:
        answer_all(make_generator(backbone, plugin, sampling, beams), backbone, plugin)


def answer_all(
    generator: Callable[[Mode], GenerateTokens], backbone: Backbone, plugin: Plugin | PeftPlugin | None
) -> None:
    """Answers the prompt of the flags, or what is typed in."""
    encoder = dataclasses.replace(prompt_encoder(backbone, plugin), reads_special=READS_SPECIAL.value)
    mode = read_mode()
    if PROMPT.value is not None:
        result = answer(generator(mode), encoder, Conversation().asked(PROMPT.value))
        if OUTPUT.value:
            write_json(Path(OUTPUT.value), result)
        return

    def answer_next(talk: Conversation, mode: Mode) -> tuple[str, list[int]]:
        said = answer(generator(mode), encoder, talk)
        return said["text"], said["tokens"]

    generator(mode)  # which says at once if it cannot be
    converse(answer_next, mode)


if __name__ == "__main__":
    command.run(main)
