"""Generate with a plugin: python -m spa_jax.generate --plugin=DIR/plugin --prompt="..." (or --interactive).

--channel=none runs everything as one program. The others run cloud and device as two, which exchange messages, and say
what that cost: in-process and simulated in this process, grpc in two. Tokens for which the device was asked are
coloured, or [bracketed] where the output is no terminal.
"""

import asyncio
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from absl import flags

from spa_jax import command
from spa_jax.data.detokenizing import StreamingDetokenizer
from spa_jax.data.encoding import Encoder
from spa_jax.data.text import check_prompt
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.models.combine import SETTINGS, Setting
from spa_jax.models.compute import WEIGHTS, Compute, Weights
from spa_jax.printer import Printer
from spa_jax.split import client
from spa_jax.split.channel import InProcess, describe_opening
from spa_jax.split.client import CloudGone, Connection, RemoteResult, read_token
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.generation import Connect, SplitResult, generate
from spa_jax.split.grpc_channel import check_address
from spa_jax.split.head import Head, head_of, load_head
from spa_jax.split.messages_pb2 import Open
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.split.simulated import Network, Simulated
from spa_jax.split.wire import CODECS, REPLIES, Codec, ReplyMode
from spa_jax.training.rows import prompt_encoder
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.peft import PeftPlugin, load_trained
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

PLUGIN = flags.DEFINE_string("plugin", None, "Directory of a plugin, as a run leaves it, or its name on the hub.")
BACKBONE = flags.DEFINE_string("backbone", None, "Backbone by name, directory or .gguf file; the plugin's by default.")
PRECISION = flags.DEFINE_enum("weights", "float", WEIGHTS, "int8 keeps the backbone's matrices in 8 bits.")
PROMPT = flags.DEFINE_string("prompt", None, "What to answer.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Read prompts from the terminal, each answered on its own.")
SETTING = flags.DEFINE_enum("setting", None, SETTINGS, "base: the backbone alone; by default the plugin's own.")
THRESHOLD = flags.DEFINE_float("threshold", None, "Ask the device where p(consult) is above it, from 0 to 1.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to generate.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Temperature of sampling; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k likeliest tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens whose probabilities reach p; 1 is all.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling, and of the simulated network.")
BEAMS = flags.DEFINE_integer("beams", 0, "Beam search with so many beams; 0 is sampling, or greedy.")
LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Beam search: above 0 favours longer answers.")
EARLY_STOPPING = flags.DEFINE_bool("early_stopping", False, "Beam search: stop when there are as many as beams.")
CHANNEL = flags.DEFINE_enum("channel", "none", ["none", "in-process", "simulated", "grpc"], "Between cloud and device.")
CODEC = flags.DEFINE_enum("codec", "float32", CODECS, "How numbers travel through the channel.")
REPLY = flags.DEFINE_enum("reply", "correction", REPLIES, "What the device answers with: g, or the token it chose.")
HEAD = flags.DEFINE_string("head", None, "File of the device's LM head, for --reply=token; by default the backbone's.")
TAU = flags.DEFINE_float("tau", Network.tau, "Simulated: seconds of a round trip.")
DOWN = flags.DEFINE_float("down", Network.down, "Simulated: bits per second from cloud to device.")
UP = flags.DEFINE_float("up", Network.up, "Simulated: bits per second from device to cloud.")
JITTER = flags.DEFINE_float("jitter", Network.jitter, "Simulated: mean seconds of random delay a message.")
LOSS = flags.DEFINE_float("loss", Network.loss, "Simulated: probability that a message is lost.")
DEADLINE = flags.DEFINE_float("deadline", Network.deadline, "Simulated: seconds to wait for the device.")
CLOUD = flags.DEFINE_string("cloud", None, "grpc: host:port of a cloud; by default one is started on this machine.")
TLS = flags.DEFINE_bool("tls", False, "grpc: speak TLS.")
INSECURE = flags.DEFINE_bool("insecure", False, "grpc: speak in the clear with other machines.")
CA = flags.DEFINE_string("ca", "", "grpc: PEM file of the authorities to trust; the system's by default.")
TOKEN_FILE = flags.DEFINE_string("token_file", "", "grpc: file with this device's token.")
OUTPUT = flags.DEFINE_string("output", None, "Write text, tokens, sources and what the channel cost as JSON.")

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
    sampling: Sampling,
    beams: Beams | None,
    prompt: list[int],
    cost: dict[str, Any],
) -> Tokens:
    """Generates by two programs in this process, and adds what passed between them to `cost`."""
    result = generate(cloud, plugin, request_for(plugin, sampling, beams, prompt), connect, head)
    (generation,) = result.generations
    cost |= describe_cost(result, len(generation.tokens), result.cloud_seconds)
    yield from zip(generation.tokens, generation.consulted)


def request_for(plugin: Plugin, sampling: Sampling, beams: Beams | None, prompt: list[int]) -> Open:
    """Makes the device's request to the cloud, by the flags."""
    return open_message(
        plugin,
        [prompt],
        MAX_NEW_TOKENS.value,
        cast(Codec, CODEC.value),
        cast(Setting | None, SETTING.value),
        THRESHOLD.value,
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
    sampling: Sampling,
    beams: Beams | None,
    prompt: list[int],
    cost: dict[str, Any],
) -> Tokens:
    """Generates with a cloud in another process, and adds to `cost` what passed between them; the seconds of the cloud
    include those of the network."""
    request = request_for(plugin, sampling, beams, prompt)
    began = time.perf_counter()
    try:
        result = asyncio.run(client.generate(connection, plugin, request, head=head))
    except CloudGone as gone:
        for generation in gone.generations:
            yield from zip(generation.tokens, generation.consulted)
        raise
    (generation,) = result.generations
    seconds = time.perf_counter() - began - result.traffic.device_seconds
    cost |= describe_cost(result, len(generation.tokens), seconds)
    yield from zip(generation.tokens, generation.consulted)


LOCAL_CLOUD = contextlib.ExitStack()
"""Ends the cloud that `start_local_cloud` has started."""


def start_local_cloud(backbone: Backbone) -> str:
    """Starts a cloud on this machine, with a long deadline since no network can be slow, and returns its address."""
    return LOCAL_CLOUD.enter_context(
        cloud_process(backbone.name, "--deadline=60", f"--weights={PRECISION.value}")
    ).address


def answer(generate_tokens: GenerateTokens, encoder: Encoder, prompt: str) -> dict[str, Any]:
    """Prints the answer to a prompt as it comes, and returns it as `--output` writes it."""
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
        for token, consulted in generate_tokens(encoder.prompt(prompt), cost):
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
    return {"prompt": prompt, "text": whole, "tokens": tokens, "sources": sources, "consulted_share": share, **cost}


def make_generator(
    backbone: Backbone, plugin: Plugin | PeftPlugin | None, sampling: Sampling, beams: Beams | None
) -> GenerateTokens:
    """Makes the function that generates over the `--channel`.

    Raises:
        UserError: the channel leads to no side network, or a network that makes no sense.
    """
    if CHANNEL.value == "none":
        if REPLY.value != "correction":
            raise UserError("--reply=token is what a device answers: name a --channel to reach one")
        model = FusedModel(backbone, plugin, cast(Setting | None, SETTING.value), THRESHOLD.value)
        return functools.partial(generate_fused, model, sampling, beams)
    if plugin is None:
        raise UserError(f"--channel={CHANNEL.value} leads to a device, which needs a plugin: name one with --plugin")
    if plugin.config.side is None:
        raise UserError(
            f"--channel={CHANNEL.value} leads to a side network, and a '{plugin.config.setting}' works within the "
            "backbone: use --channel=none (experiments.benchmarks.table2_network counts what its layers would exchange)"
        )
    plugin = cast(Plugin, plugin)
    plugin.check(backbone)
    head = head_for(plugin, backbone)
    if CHANNEL.value == "grpc":
        address = check_address(CLOUD.value or start_local_cloud(backbone), TLS.value, INSECURE.value)
        connection = Connection(address, TLS.value, CA.value, read_token(TOKEN_FILE.value))
        return functools.partial(generate_remote, connection, plugin, head, sampling, beams)
    connect: Connect = InProcess
    if CHANNEL.value == "simulated":
        network = Network(TAU.value, DOWN.value, UP.value, JITTER.value, LOSS.value, DEADLINE.value, SEED.value)
        connect = functools.partial(Simulated, network=network)
    return functools.partial(generate_split, Cloud(backbone), plugin, head, connect, sampling, beams)


def main() -> None:
    if (PROMPT.value is None) == (not INTERACTIVE.value):
        raise UserError("give either --prompt='...' or --interactive")
    if PROMPT.value is not None:
        check_prompt(PROMPT.value)
    if PLUGIN.value is None and BACKBONE.value is None:
        raise UserError("name a plugin with --plugin=DIR, or a backbone alone with --backbone=NAME")
    if INTERACTIVE.value and OUTPUT.value:
        raise UserError("--output goes with --prompt, not with --interactive")
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value).check()
    if BEAMS.value < 0:
        raise UserError(f"--beams is {BEAMS.value}, but must be 0 (no beam search) or more")
    if BEAMS.value and TEMPERATURE.value:
        raise UserError("--beams searches and --temperature samples: give one of them")
    beams = Beams(BEAMS.value, LENGTH_PENALTY.value, EARLY_STOPPING.value) if BEAMS.value else None
    plugin = load_trained(plugin_directory(PLUGIN.value)) if PLUGIN.value is not None else None
    backbone = load_backbone(
        BACKBONE.value or (plugin.backbone if plugin else ""), compute=Compute(weights=cast(Weights, PRECISION.value))
    )
    with LOCAL_CLOUD:
        answer_all(make_generator(backbone, plugin, sampling, beams), backbone, plugin)


def answer_all(generate_tokens: GenerateTokens, backbone: Backbone, plugin: Plugin | PeftPlugin | None) -> None:
    """Answers the prompt of the flags, or those typed in."""
    encoder = prompt_encoder(backbone, plugin)
    if PROMPT.value is not None:
        result = answer(generate_tokens, encoder, PROMPT.value)
        if OUTPUT.value:
            write_json(Path(OUTPUT.value), result)
        return
    for prompt in command.typed_prompts():
        try:
            answer(generate_tokens, encoder, prompt)
        except CloudGone:
            raise
        except UserError as error:  # such as one prompt that is too long: the next may be answered
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
