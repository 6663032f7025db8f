"""Cloud and device on two machines.

    python -m spa_jax.serve cloud --backbone=NAME --host=0.0.0.0 --tls_cert=FILE --tls_key=FILE --tokens=FILE
    python -m spa_jax.serve device --plugin=DIR --cloud=HOST:8470 --tls --token_file=FILE --prompt="..."

The cloud never sees a side parameter; the device needs neither backbone nor tokenizer. The cloud logs one JSON object a
line, prompts and activations never.
"""

import asyncio
import json
import logging
import signal
import sys
from pathlib import Path

import prometheus_client
from absl import flags

from spa_jax import command
from spa_jax.decoding.beam import Beams
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.split.client import CloudGone, Connection, RemoteResult, generate, read_token
from spa_jax.split.generation import open_message
from spa_jax.split.grpc_channel import ServerSecurity, check_address
from spa_jax.split.messages_pb2 import Progress
from spa_jax.split.server import Limits, serving
from spa_jax.split.session import Cloud
from spa_jax.split.wire import CODECS, check_codec
from spa_jax.weights.plugin import Plugin, load_plugin
from spa_jax.weights.registry import load_backbone

HOST = flags.DEFINE_string("host", "127.0.0.1", "cloud: address to listen on; 0.0.0.0 for all.")
PORT = flags.DEFINE_integer("port", 8470, "cloud: port to listen on; 0 for any that is free.")
METRICS_PORT = flags.DEFINE_integer("metrics_port", 0, "cloud: port of Prometheus metrics; 0 for none.")
BACKBONE = flags.DEFINE_string("backbone", "smollm2-135m-instruct", "cloud: name, directory or .gguf file.")
TLS_CERT = flags.DEFINE_string("tls_cert", "", "cloud: PEM file of its certificate.")
TLS_KEY = flags.DEFINE_string("tls_key", "", "cloud: PEM file of its private key.")
TOKENS = flags.DEFINE_string("tokens", "", "cloud: file with one device token a line; none serves everybody.")
DEADLINE = flags.DEFINE_float("deadline", Limits.deadline, "cloud: seconds a device has for an answer.")
SESSIONS = flags.DEFINE_integer("sessions", Limits.sessions, "cloud: most generations at once.")
INSECURE = flags.DEFINE_bool("insecure", False, "Speak in the clear with other machines.")
PLUGIN = flags.DEFINE_string("plugin", None, "device: directory of a plugin.")
CLOUD = flags.DEFINE_string("cloud", "127.0.0.1:8470", "device: host:port of the cloud.")
TLS = flags.DEFINE_bool("tls", False, "device: speak TLS.")
CA = flags.DEFINE_string("ca", "", "device: PEM file of the authorities to trust; the system's by default.")
TOKEN_FILE = flags.DEFINE_string("token_file", "", "device: file with its token.")
PROMPT = flags.DEFINE_string("prompt", None, "device: what to answer.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "device: read prompts from the terminal.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "device: most tokens to generate.")
BEAMS = flags.DEFINE_integer("beams", 0, "device: beam search with so many beams; 0 is greedy.")
CODEC = flags.DEFINE_enum("codec", "float32", CODECS, "device: how numbers travel.")
OUTPUT = flags.DEFINE_string("output", None, "device: write text, tokens, sources and cost as JSON.")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": record.created, "level": record.levelname, "logger": record.name}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({**entry, "message": record.getMessage()})


async def run_cloud() -> None:
    """Serves until it is told to stop."""
    security = ServerSecurity(TLS_CERT.value, TLS_KEY.value, TOKENS.value)
    address = check_address(f"{HOST.value}:{PORT.value}", bool(TLS_CERT.value), INSECURE.value)
    cloud = Cloud(load_backbone(BACKBONE.value))
    if METRICS_PORT.value:
        prometheus_client.start_http_server(METRICS_PORT.value)
    limits = Limits(sessions=SESSIONS.value, deadline=DEADLINE.value)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with serving(cloud, address, limits, security) as (_, port):
        print(f"serving on port {port}", flush=True)
        await stop.wait()


def ask(plugin: Plugin, connection: Connection, prompt: str) -> None:
    """Prints the answer to a prompt as it comes."""
    printed = ""

    def watch(progress: Progress) -> None:
        nonlocal printed
        text = progress.generated[0].text
        if text.startswith(printed) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[len(printed) :])
            sys.stdout.flush()
            printed = text

    beams = Beams(BEAMS.value) if BEAMS.value else None
    request = open_message(plugin, [prompt], MAX_NEW_TOKENS.value, check_codec(CODEC.value), beams=beams)
    try:
        result: RemoteResult = asyncio.run(generate(connection, plugin, request, watch))
    finally:
        print()
    (generation,), traffic = result.generations, result.traffic
    print(
        f"{len(generation.tokens)} tokens, consulted share {generation.consulted_share:.2f}; {traffic.exchanges} "
        f"exchanges, {traffic.bytes_down:,} bytes down and {traffic.bytes_up:,} up, {result.degraded} tokens degraded"
    )
    if OUTPUT.value:
        described = {
            "prompt": prompt,
            "text": result.texts[0],
            "tokens": generation.tokens,
            "sources": ["device" if asked else "cloud" for asked in generation.consulted],
            "exchanges": traffic.exchanges,
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
            "prefill_bytes": traffic.prefill_bytes,
            "degraded": result.degraded,
        }
        write_json(Path(OUTPUT.value), described)


def run_device() -> None:
    """Answers one prompt, or those typed in."""
    if PLUGIN.value is None:
        raise UserError("name a plugin with --plugin=DIR")
    if (PROMPT.value is None) == (not INTERACTIVE.value):
        raise UserError("give either --prompt='...' or --interactive")
    plugin = load_plugin(Path(PLUGIN.value))
    address = check_address(CLOUD.value, TLS.value, INSECURE.value)
    connection = Connection(address, TLS.value, CA.value, read_token(TOKEN_FILE.value))
    if PROMPT.value is not None:
        if not PROMPT.value.strip():
            raise UserError("the prompt is empty")
        ask(plugin, connection, PROMPT.value)
        return
    for prompt in command.typed_prompts():
        try:
            ask(plugin, connection, prompt)
        except CloudGone:
            raise
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def main() -> None:
    if ROLE == "device":
        run_device()
    elif ROLE == "cloud":
        for handler in logging.getLogger("spa_jax").handlers:
            handler.setFormatter(JsonLines())
        asyncio.run(run_cloud())
    else:
        raise UserError("say which half this is: python -m spa_jax.serve cloud, or python -m spa_jax.serve device")


ROLE = ""

if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        ROLE = sys.argv.pop(1)
    command.run(main)
