"""Cloud and device on two machines.

    python -m spa_jax.serve cloud --backbone=NAME --host=0.0.0.0 --tls_cert=FILE --tls_key=FILE --tokens=FILE
    python -m spa_jax.serve device --plugin=DIR --cloud=HOST:8470 --tls --token_file=FILE --prompt="..."
    python -m spa_jax.serve head --backbone=NAME --codec=int8 --output=FILE

The cloud never sees a side parameter; the device needs neither backbone nor tokenizer. With --reply=token it needs the
LM head, which the third command writes, and answers with nothing but the tokens it chose. The cloud logs one JSON
object a line, prompts and activations never.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import cast

import jax
import prometheus_client
from absl import flags

from spa_jax import command
from spa_jax.data.text import check_prompt
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.models.combine import SETTINGS, Setting
from spa_jax.models.compute import WEIGHTS, Compute, Weights
from spa_jax.printer import Printer
from spa_jax.split.channel import describe_opening
from spa_jax.split.client import CloudGone, Connection, RemoteResult, generate, read_token
from spa_jax.split.grpc_channel import ServerSecurity, check_address
from spa_jax.split.head import Head, load_head, save_head
from spa_jax.split.messages_pb2 import Progress
from spa_jax.split.request import open_message
from spa_jax.split.server import Limits, serving
from spa_jax.split.session import Cloud
from spa_jax.split.wire import CODECS, REPLIES, ReplyMode, check_codec, check_reply
from spa_jax.training.sharding import MeshConfig, MeshPartitioner, make_mesh
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.mapping import DTYPES
from spa_jax.weights.plugin import Plugin, load_plugin
from spa_jax.weights.registry import load_backbone

HOST = flags.DEFINE_string("host", "127.0.0.1", "cloud: address to listen on; 0.0.0.0 for all.")
PORT = flags.DEFINE_integer("port", 8470, "cloud: port to listen on; 0 for any that is free.")
METRICS_PORT = flags.DEFINE_integer("metrics_port", 0, "cloud: port of Prometheus metrics, on --host; 0 for none.")
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
MEMORY = flags.DEFINE_float("memory", Limits.memory / 2**30, "cloud: GiB of the caches of all generations at once.")
UNTIL_INPUT_ENDS = flags.DEFINE_bool(
    "until_input_ends", False, "cloud: stop when standard input ends, as it does with the process at its other end."
)
INSECURE = flags.DEFINE_bool("insecure", False, "Speak in the clear with other machines.")
PLUGIN = flags.DEFINE_string("plugin", None, "device: directory of a plugin, or its name on the hub.")
CLOUD = flags.DEFINE_string("cloud", "127.0.0.1:8470", "device: host:port of the cloud.")
TLS = flags.DEFINE_bool("tls", False, "device: speak TLS.")
CA = flags.DEFINE_string("ca", "", "device: PEM file of the authorities to trust; the system's by default.")
TOKEN_FILE = flags.DEFINE_string("token_file", "", "device: file with its token.")
PROMPT = flags.DEFINE_string("prompt", None, "device: what to answer.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "device: read prompts from the terminal.")
SETTING = flags.DEFINE_enum("setting", None, SETTINGS, "device: by default the plugin's own.")
THRESHOLD = flags.DEFINE_float("threshold", None, "device: be asked where p(consult) is above it, from 0 to 1.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "device: most tokens to generate.")
BEAMS = flags.DEFINE_integer("beams", 0, "device: beam search with so many beams; 0 is sampling, or greedy.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "device: temperature of sampling; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "device: sample among the k likeliest tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "device: sample among the likeliest whose probabilities reach p; 1 is all.")
SEED = flags.DEFINE_integer("seed", 0, "device: seed of sampling.")
CODEC = flags.DEFINE_enum("codec", "float32", CODECS, "device: how numbers travel; head: how they are written.")
REPLY = flags.DEFINE_enum("reply", "correction", REPLIES, "device: answer with g, or with the token it chose.")
HEAD = flags.DEFINE_string("head", None, "device: file of the LM head, for --reply=token.")
OUTPUT = flags.DEFINE_string("output", None, "device: JSON of text, tokens, sources and cost; head: the file to write.")


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


async def run_cloud() -> None:
    """Serves devices until a signal, or with `--until_input_ends` the end of standard input."""
    security = ServerSecurity(TLS_CERT.value, TLS_KEY.value, TOKENS.value)
    address = check_address(f"{HOST.value}:{PORT.value}", bool(TLS_CERT.value), INSECURE.value)
    limits = Limits(
        sessions=SESSIONS.value,
        sessions_per_token=SESSIONS_PER_TOKEN.value,
        memory=int(MEMORY.value * 2**30),
        deadline=DEADLINE.value,
        first_deadline=FIRST_DEADLINE.value,
        linger=LINGER.value,
    ).check()
    cloud = Cloud(load_sharded())
    if METRICS_PORT.value:
        try:
            prometheus_client.start_http_server(METRICS_PORT.value, HOST.value)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve metrics on {HOST.value}:{METRICS_PORT.value}: {error}") from error
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)

    def stop_at_end_of_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    if UNTIL_INPUT_ENDS.value:
        loop.add_reader(0, stop_at_end_of_input)
    async with serving(cloud, address, limits, security) as (_, port):
        print(f"serving on port {port}", flush=True)
        await stop.wait()


def ask(plugin: Plugin, head: Head | None, connection: Connection, prompt: str) -> None:
    """Prints the answer to a prompt as it comes."""
    printer, num_printed = Printer(), 0

    def print_new(progress: Progress) -> None:
        nonlocal num_printed
        (answer,) = progress.generated
        for text, consulted in zip(answer.pieces[num_printed:], answer.consulted[num_printed:]):
            printer.add(text, consulted)
        num_printed = len(answer.pieces)

    request = open_message(
        plugin,
        [prompt],
        MAX_NEW_TOKENS.value,
        check_codec(CODEC.value),
        setting=cast(Setting | None, SETTING.value),
        threshold=THRESHOLD.value,
        sampling=Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value).check(),
        seed=SEED.value,
        beams=Beams(BEAMS.value) if BEAMS.value else None,
        reply=cast(ReplyMode, REPLY.value),
    )
    try:
        result: RemoteResult = asyncio.run(generate(connection, plugin, request, print_new, head))
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
            "prompt": prompt,
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


def run_device() -> None:
    """Answers one prompt, or those typed in."""
    if PLUGIN.value is None:
        raise UserError("name a plugin with --plugin=DIR")
    if (PROMPT.value is None) == (not INTERACTIVE.value):
        raise UserError("give either --prompt='...' or --interactive")
    if PROMPT.value is not None:
        check_prompt(PROMPT.value)
    plugin = load_plugin(plugin_directory(PLUGIN.value))
    head = None
    check_reply(REPLY.value, False, plugin.config.entry)
    if REPLY.value == "token":
        if HEAD.value is None:
            raise UserError("--reply=token needs --head=FILE: write one with python -m spa_jax.serve head")
        head = load_head(Path(HEAD.value), plugin.fingerprint, plugin.config.hidden_size)
    address = check_address(CLOUD.value, TLS.value, INSECURE.value)
    connection = Connection(address, TLS.value, CA.value, read_token(TOKEN_FILE.value))
    if PROMPT.value is not None:
        ask(plugin, head, connection, PROMPT.value)
        return
    for prompt in command.typed_prompts():
        try:
            ask(plugin, head, connection, prompt)
        except CloudGone:
            raise
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def write_head() -> None:
    """Writes the backbone's LM head for devices."""
    if OUTPUT.value is None:
        raise UserError("name the file to write with --output=FILE")
    save_head(Path(OUTPUT.value), load_backbone(BACKBONE.value), check_codec(CODEC.value))


def main() -> None:
    if ROLE == "device":
        run_device()
    elif ROLE == "cloud":
        lines = logging.getLogger("spa_jax").handlers[0]
        lines.setFormatter(JsonLines())
        logging.getLogger().handlers[:] = [lines]  # what gRPC and asyncio say too
        asyncio.run(run_cloud())
    elif ROLE == "head":
        write_head()
    else:
        raise UserError("say which half this is: python -m spa_jax.serve cloud, or python -m spa_jax.serve device")


ROLE = ""

if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        ROLE = sys.argv.pop(1)
    command.run(main)
