"""Cloud and device on two machines.

    python -m spa_jax.serve cloud --backbone=NAME --host=0.0.0.0 --tls_cert=FILE --tls_key=FILE --tokens=FILE
    python -m spa_jax.serve device --plugin=DIR --cloud=HOST:8470 --tls --token_file=FILE --prompt="..."
    python -m spa_jax.serve head --backbone=NAME --codec=int8 --output=FILE

The cloud never sees a side parameter; the device needs neither backbone nor tokenizer. With --reply=token it needs the
LM head, which the third command writes, and answers with nothing but the tokens it chose. The cloud logs one JSON
object a line, prompts and activations never.
"""

import asyncio
import dataclasses
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast, get_args

from absl import flags

from spa_jax import command, compilation_cache
from spa_jax.choices import CODECS, DTYPES, REPLIES, SETTINGS, ReplyMode, Setting
from spa_jax.data.text import check_prompt
from spa_jax.endpoint.listener import listen
from spa_jax.errors import UserError
from spa_jax.models.compute import WEIGHTS, Compute, Weights
from spa_jax.split.admission import Limits
from spa_jax.split.connection import Connection, read_token
from spa_jax.split.grpc_channel import ServerSecurity, SharePrefixes, check_address, check_free

flags.adopt_module_key_flags(compilation_cache)  # --help shows them
HOST = flags.DEFINE_string("host", "127.0.0.1", "cloud: address to listen on; 0.0.0.0 for all.")
PORT = flags.DEFINE_integer("port", 8470, "cloud: port to listen on; 0 for any that is free.")
METRICS_PORT = flags.DEFINE_integer("metrics_port", 0, "cloud: port of Prometheus metrics; 0 for none.")
METRICS_HOST = flags.DEFINE_string("metrics_host", "", "cloud: address of the metrics; by default that of --host.")
BACKBONE = flags.DEFINE_string("backbone", "smollm2-135m-instruct", "cloud, head: name, directory or .gguf file.")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "cloud: dtype of the backbone; bfloat16 on GPUs and TPUs.")
PRECISION = flags.DEFINE_enum("weights", "float", WEIGHTS, "cloud: int8 keeps the backbone's matrices in 8 bits.")
TENSOR = flags.DEFINE_integer("tensor", 1, "cloud: devices that every block is split over.", lower_bound=1)
TLS_CERT = flags.DEFINE_string("tls_cert", "", "cloud: PEM file of its certificate.")
TLS_KEY = flags.DEFINE_string("tls_key", "", "cloud: PEM file of its private key.")
TOKENS = flags.DEFINE_string("tokens", "", "cloud: file with one device token a line; none serves everybody.")
DEADLINE = flags.DEFINE_float("deadline", Limits.deadline, "cloud: seconds a device has for an answer.")
FIRST_DEADLINE = flags.DEFINE_float(
    "first_deadline",
    Limits.first_deadline,
    "cloud: seconds for its first answer of a kind, before which a device compiles.",
)
SESSIONS = flags.DEFINE_integer("sessions", Limits.sessions, "cloud: most generations at once.")
SESSIONS_PER_TOKEN = flags.DEFINE_integer(
    "sessions_per_token", Limits.sessions_per_token, "cloud: most generations at once of one device token."
)
LINGER = flags.DEFINE_float("linger", Limits.linger, "cloud: seconds a finished answer is kept for a lost device.")
MEMORY = flags.DEFINE_float(
    "memory", Limits.memory / 2**30, "cloud: GiB of all generations at once, and of the cache that they share."
)
SHARE_PREFIXES = flags.DEFINE_enum(
    "share_prefixes",
    "all",
    get_args(SharePrefixes),
    "cloud: who may begin with keys and values that were computed for others: all, those with the same token, or none.",
)
QUEUE = flags.DEFINE_integer("queue", Limits.queue, "cloud: generations that may wait for room; 0 refuses at once.")
QUEUE_SECONDS = flags.DEFINE_float("queue_seconds", Limits.queue_seconds, "cloud: seconds that each may wait for room.")
ABANDONED = flags.DEFINE_float(
    "abandoned", Limits.abandoned, "cloud: seconds after which a generation ends that no device is attached to."
)
WARM = flags.DEFINE_integer(
    "warm",
    0,
    "cloud: compile before serving what prompts and answers of so many tokens together need; 0 compiles when needed.",
    lower_bound=0,
)
DRAIN = flags.DEFINE_float("drain", 10.0, "cloud: seconds that generations under way have to end after a SIGTERM.")
UNTIL_INPUT_ENDS = flags.DEFINE_bool(
    "until_input_ends", False, "cloud: stop when standard input ends, as it does with the process at its other end."
)
INSECURE = flags.DEFINE_bool("insecure", False, "Speak in the clear with other machines.")
PLUGIN = flags.DEFINE_multi_string(
    "plugin",
    [],
    "device: directory of a plugin, or its name on the hub; with --http may be repeated, and NAME=DIR names its model.",
)
CLOUD = flags.DEFINE_string("cloud", "127.0.0.1:8470", "device: host:port of the cloud.")
TLS = flags.DEFINE_bool("tls", False, "device: speak TLS.")
CA = flags.DEFINE_string("ca", "", "device: PEM file of the authorities to trust; the system's by default.")
TOKEN_FILE = flags.DEFINE_string("token_file", "", "device: file with its token.")
PATIENCE = flags.DEFINE_float(
    "patience",
    60.0,
    "device: seconds to wait for room at a cloud that is busy, and in a conversation for one that is gone.",
)
SILENCE = flags.DEFINE_float("silence", Connection.silence, "device: seconds without a word from a cloud that is dead.")
PROMPT = flags.DEFINE_string("prompt", None, "device: what to answer.")
INTERACTIVE = flags.DEFINE_bool(
    "interactive", False, "device: hold a conversation on the terminal; /help shows its commands."
)
READS_SPECIAL = flags.DEFINE_bool(
    "special_tokens",
    False,
    "device: let the names of special tokens in prompts, such as <|im_end|>, be these tokens and not text.",
)
SETTING = flags.DEFINE_enum("setting", None, SETTINGS, "device: by default the plugin's own.")
THRESHOLD = flags.DEFINE_float(
    "threshold", None, "device: be asked where p(consult) is above it, from 0 to 1.", lower_bound=0, upper_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "device: most tokens to generate.", lower_bound=1)
BEAMS = flags.DEFINE_integer("beams", 0, "device: beam search with so many beams; 0 is sampling, or greedy.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "device: temperature of sampling; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "device: sample among the k likeliest tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "device: sample among the likeliest whose probabilities reach p; 1 is all.")
SEED = flags.DEFINE_integer("seed", 0, "device: seed of sampling.")
HTTP = flags.DEFINE_string(
    "http", "", "device: serve OpenAI's API and a page at this host:port, such as 127.0.0.1:8471."
)
HTTP_KEY_FILE = flags.DEFINE_string("http_key_file", "", "device: file with the key that clients of --http must show.")
CODEC = flags.DEFINE_enum("codec", "float32", CODECS, "device: how numbers travel; head: how they are written.")
REPLY = flags.DEFINE_enum("reply", "correction", REPLIES, "device: answer with g, or with the token it chose.")
HEAD = flags.DEFINE_string("head", None, "device: file of the LM head, for --reply=token.")
OUTPUT = flags.DEFINE_string("output", None, "device: JSON of text, tokens, sources and cost; head: the file to write.")


ROLE = ""


def limits_of_cloud() -> Limits:
    """Makes the cloud's limits of its flags.

    Raises:
        UserError: nothing could be within one of them.
    """
    return Limits(
        sessions=SESSIONS.value,
        sessions_per_token=SESSIONS_PER_TOKEN.value,
        memory=int(MEMORY.value * 2**30),
        deadline=DEADLINE.value,
        first_deadline=FIRST_DEADLINE.value,
        linger=LINGER.value,
        queue=QUEUE.value,
        queue_seconds=QUEUE_SECONDS.value,
        abandoned=ABANDONED.value,
    ).check()


def security_of_cloud() -> ServerSecurity:
    """Makes the cloud's certificate and tokens of its flags.

    Raises:
        UserError: their files cannot be used.
    """
    share = cast(SharePrefixes, SHARE_PREFIXES.value)
    return ServerSecurity(TLS_CERT.value, TLS_KEY.value, TOKENS.value, share).check()


def address_of_cloud() -> str:
    """Returns where the cloud is to listen.

    Raises:
        UserError: it would speak in the clear with other machines, or cannot listen there.
    """
    return check_free(check_address(f"{HOST.value}:{PORT.value}", bool(TLS_CERT.value), INSECURE.value))


def connection_of_device() -> Connection:
    """Makes the device's connection to its cloud of the flags.

    Raises:
        UserError: it would speak in the clear with another machine, or a file cannot be used.
    """
    address = check_address(CLOUD.value, TLS.value, INSECURE.value)
    token = read_token(TOKEN_FILE.value)
    connection = Connection(address, TLS.value, CA.value, token, queue_seconds=PATIENCE.value, silence=SILENCE.value)
    if INTERACTIVE.value:
        connection = dataclasses.replace(connection, patience=PATIENCE.value)
    return connection.check()


def check_flags() -> None:
    """Refuses flags that no model is needed to refuse.

    Raises:
        UserError: such a flag.
    """
    if ROLE == "cloud":
        limits_of_cloud()
        security_of_cloud()
        address_of_cloud()
    elif ROLE == "device":
        if not PLUGIN.value:
            raise UserError("name a plugin with --plugin=DIR")
        if (PROMPT.value is not None) + INTERACTIVE.value + bool(HTTP.value) != 1:
            raise UserError("give either --prompt='...' or --interactive, or --http=HOST:PORT")
        if len(PLUGIN.value) > 1 and not HTTP.value:
            raise UserError("several plugins go with --http alone: name one")
        if HTTP.value and (BEAMS.value or REPLY.value != "correction" or OUTPUT.value):
            raise UserError("--beams, --reply and --output do not go with --http: leave them out")
        key = read_token(HTTP_KEY_FILE.value)
        if HTTP.value:
            listen(HTTP.value, bool(key)).close()
        if PROMPT.value is not None:
            check_prompt(PROMPT.value)
        if REPLY.value == "token" and HEAD.value is None:
            raise UserError("--reply=token needs --head=FILE: write one with python -m spa_jax.serve head")
        connection_of_device()
    elif ROLE == "head":
        if OUTPUT.value is None:
            raise UserError("name the file to write with --output=FILE")
    else:
        raise UserError("say which half this is: python -m spa_jax.serve cloud, or python -m spa_jax.serve device")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        ROLE = sys.argv.pop(1)
    command.read_flags(check_flags)

import jax

from spa_jax.conversation import Conversation
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import Sampling
from spa_jax.endpoint.app import Endpoint
from spa_jax.endpoint.requests import Defaults
from spa_jax.endpoint.server import load_plugins, serve
from spa_jax.engine.layouts import lay_out
from spa_jax.files import write_json
from spa_jax.printer import Printer
from spa_jax.split import metrics
from spa_jax.split.channel import describe_opening
from spa_jax.split.client import RemoteResult, SessionLost, generate
from spa_jax.split.head import Head, load_head, save_head
from spa_jax.split.messages_pb2 import Progress
from spa_jax.split.request import open_message
from spa_jax.split.server import serving
from spa_jax.split.session import Cloud
from spa_jax.split.wire import check_codec, check_reply
from spa_jax.terminal import Mode, converse
from spa_jax.training.sharding import MeshConfig, MeshPartitioner, make_mesh
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.plugin import Plugin, load_plugin
from spa_jax.weights.registry import load_backbone


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": record.created, "level": record.levelname, "logger": record.name}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({**entry, "message": record.getMessage()})


def load_sharded() -> Backbone:
    """Loads the backbone over the first `--tensor` devices.

    Raises:
        UserError: there are not so many devices, or the heads cannot be divided among them.
    """
    devices = jax.devices()
    if TENSOR.value > len(devices):
        raise UserError(f"--tensor={TENSOR.value}, but this machine has {len(devices)} devices")
    partitioner = MeshPartitioner(make_mesh(MeshConfig(1, 1, TENSOR.value, 1), 1, devices[: TENSOR.value]))
    return load_backbone(BACKBONE.value, DTYPE.value, partitioner, Compute(weights=cast(Weights, PRECISION.value)))


async def run_until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Does some work, unless an event comes before its end."""
    tasks = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if tasks[0].done():
        tasks[0].result()
    for task in tasks:
        task.cancel()


async def run_cloud() -> None:
    """Serves devices until a signal, or with `--until_input_ends` the end of standard input."""
    security, address, limits = security_of_cloud(), address_of_cloud(), limits_of_cloud()
    if METRICS_PORT.value:
        metrics.serve(METRICS_HOST.value or HOST.value, METRICS_PORT.value)
    cloud = Cloud(lay_out(load_sharded()))
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    has_input_ended = False
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)

    def stop_at_end_of_input() -> None:
        nonlocal has_input_ended
        if not os.read(0, 4096):
            loop.remove_reader(0)
            has_input_ended = True
            stop.set()

    if UNTIL_INPUT_ENDS.value:
        loop.add_reader(0, stop_at_end_of_input)
    async with serving(cloud, address, limits, security) as (service, port):
        if WARM.value:
            await run_until(stop, service.warm(WARM.value))
        print(f"serving on port {port}", flush=True)
        await stop.wait()
        if not has_input_ended:
            await service.drain(DRAIN.value)


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
        sampling=Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value).check(),
        seed=SEED.value,
        beams=Beams(BEAMS.value) if BEAMS.value else None,
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


def run_device() -> None:
    """Answers one prompt, what is typed in, or programs that speak HTTP."""
    if HTTP.value:
        run_endpoint()
        return
    plugin = load_plugin(plugin_directory(PLUGIN.value[0]))
    head = None
    check_reply(REPLY.value, False, plugin.config.entry)
    if REPLY.value == "token":
        head = load_head(Path(cast(str, HEAD.value)), plugin.fingerprint, plugin.config.hidden_size)
    connection, mode = connection_of_device(), Mode(cast(Setting | None, SETTING.value), THRESHOLD.value)
    if PROMPT.value is not None:
        ask(plugin, head, connection, Conversation().asked(PROMPT.value), mode)
        return
    converse(functools.partial(ask_on, plugin, head, connection), mode)


def ask_on(
    plugin: Plugin, head: Head | None, connection: Connection, talk: Conversation, mode: Mode
) -> tuple[str, list[int]]:
    """Asks as `ask` does, and once more where the cloud has forgotten the answer that it was about to give."""
    try:
        return ask(plugin, head, connection, talk, mode)
    except SessionLost:
        print("the cloud was started anew, and has forgotten this answer: asking again", file=sys.stderr)
        return ask(plugin, head, connection, talk, mode)


def run_endpoint() -> None:
    """Answers programs that speak HTTP, until a signal."""
    key, connection = read_token(HTTP_KEY_FILE.value), connection_of_device()
    with listen(HTTP.value, bool(key)) as listener:
        sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value).check()
        mode = Mode(cast(Setting | None, SETTING.value), THRESHOLD.value)
        defaults = Defaults(MAX_NEW_TOKENS.value, sampling, SEED.value, mode)
        serve(Endpoint(load_plugins(PLUGIN.value), connection, defaults, key).check(), listener)


def write_head() -> None:
    """Writes the backbone's LM head for devices."""
    save_head(Path(cast(str, OUTPUT.value)), load_backbone(BACKBONE.value), check_codec(CODEC.value))


def main() -> None:
    compilation_cache.keep_programs()
    if ROLE == "device":
        run_device()
    elif ROLE == "cloud":
        lines = logging.getLogger("spa_jax").handlers[0]
        lines.setFormatter(JsonLines())
        logging.getLogger().handlers[:] = [lines]  # what gRPC and asyncio say too
        asyncio.run(run_cloud())
    else:
        write_head()


if __name__ == "__main__":
    command.run(main)
