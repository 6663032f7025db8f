"""Flags of `python -m spa_jax.serve device`."""

import dataclasses

from absl import flags

from spa_jax import answer_flags
from spa_jax.answer_flags import BEAMS, INTERACTIVE, OUTPUT, PROMPT, REPLY
from spa_jax.endpoint.listener import listen
from spa_jax.errors import UserError
from spa_jax.split.connection import Connection, read_token

flags.adopt_module_key_flags(answer_flags)  # --help shows them
PLUGIN = flags.DEFINE_multi_string(
    "plugin",
    [],
    "Directory of a plugin, or its name on the hub; with --http may be repeated, and NAME=DIR names its model.",
)
CLOUD = flags.DEFINE_string("cloud", "127.0.0.1:8470", "The cloud, as host:port.")
PATIENCE = flags.DEFINE_float(
    "patience",
    60.0,
    "Seconds to wait for room at a cloud that is busy, and in a conversation for one that is gone.",
)
HTTP = flags.DEFINE_string("http", "", "Serve OpenAI's API and a page at this host:port, such as 127.0.0.1:8471.")
HTTP_KEY_FILE = flags.DEFINE_string("http_key_file", "", "File with the key that clients of --http must show.")
HEAD = flags.DEFINE_string("head", None, "File of the LM head, for --reply=token.")


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
    answer_flags.check()
    key = read_token(HTTP_KEY_FILE.value)
    if HTTP.value:
        listen(HTTP.value, bool(key)).close()
    if REPLY.value == "token" and HEAD.value is None:
        raise UserError("--reply=token needs --head=FILE: write one with python -m spa_jax.serve head")
    read_connection()


def read_connection() -> Connection:
    """Makes the device's connection to its cloud.

    Raises:
        UserError: it would speak in the clear with another machine, or a file cannot be used.
    """
    connection = dataclasses.replace(answer_flags.read_connection(CLOUD.value), queue_seconds=PATIENCE.value)
    return (dataclasses.replace(connection, patience=PATIENCE.value) if INTERACTIVE.value else connection).check()
