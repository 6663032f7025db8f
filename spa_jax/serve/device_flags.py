"""Flags of `python -m spa_jax.serve device`."""

import dataclasses

from absl import flags

from spa_jax.choices import CODECS, REPLIES, SETTINGS
from spa_jax.data.text import check_prompt
from spa_jax.endpoint.listener import listen
from spa_jax.errors import UserError
from spa_jax.split.connection import Connection, read_token
from spa_jax.split.grpc_channel import check_address

PLUGIN = flags.DEFINE_multi_string(
    "plugin",
    [],
    "Directory of a plugin, or its name on the hub; with --http may be repeated, and NAME=DIR names its model.",
)
CLOUD = flags.DEFINE_string("cloud", "127.0.0.1:8470", "The cloud, as host:port.")
TLS = flags.DEFINE_bool("tls", False, "Speak TLS.")
CA = flags.DEFINE_string("ca", "", "PEM file of the authorities to trust; the system's by default.")
TOKEN_FILE = flags.DEFINE_string("token_file", "", "File with the token of this device.")
INSECURE = flags.DEFINE_bool("insecure", False, "Speak in the clear with other machines.")
PATIENCE = flags.DEFINE_float(
    "patience",
    60.0,
    "Seconds to wait for room at a cloud that is busy, and in a conversation for one that is gone.",
)
SILENCE = flags.DEFINE_float("silence", Connection.silence, "Seconds without a word from a cloud that is dead.")
PROMPT = flags.DEFINE_string("prompt", None, "What to answer.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Hold a conversation on the terminal; /help shows its commands.")
READS_SPECIAL = flags.DEFINE_bool(
    "special_tokens",
    False,
    "Let the names of special tokens in prompts, such as <|im_end|>, be these tokens and not text.",
)
SETTING = flags.DEFINE_enum("setting", None, SETTINGS, "Other setting than the plugin's own.")
THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Be asked where p(consult) is above it, from 0 to 1.", lower_bound=0, upper_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to generate.", lower_bound=1)
BEAMS = flags.DEFINE_integer("beams", 0, "Beam search with so many beams; 0 is sampling, or greedy.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Temperature of sampling; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k likeliest tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest whose probabilities reach p; 1 is all.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")
HTTP = flags.DEFINE_string("http", "", "Serve OpenAI's API and a page at this host:port, such as 127.0.0.1:8471.")
HTTP_KEY_FILE = flags.DEFINE_string("http_key_file", "", "File with the key that clients of --http must show.")
CODEC = flags.DEFINE_enum("codec", "float32", CODECS, "How numbers travel.")
REPLY = flags.DEFINE_enum("reply", "correction", REPLIES, "Answer with g, or with the token it chose.")
HEAD = flags.DEFINE_string("head", None, "File of the LM head, for --reply=token.")
OUTPUT = flags.DEFINE_string("output", None, "File to write: JSON of text, tokens, sources and cost.")


def check() -> None:
    """Refuses flags that no model is needed to refuse.

    Raises:
        UserError: such a flag.
    """
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
    read_connection()


def read_connection() -> Connection:
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
