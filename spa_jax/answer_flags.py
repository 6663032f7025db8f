"""Flags of what is to be answered and how, which `spa_jax.generate` and `spa_jax.serve device` share.

This module is imported before flags are read; what takes long to import, its functions import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from absl import flags

from spa_jax.choices import CODECS, REPLIES, SETTINGS, Setting
from spa_jax.data.text import check_prompt
from spa_jax.errors import UserError
from spa_jax.split.connection import Connection, read_token
from spa_jax.split.grpc_channel import check_address

if TYPE_CHECKING:
    from spa_jax.decoding.beam import Beams
    from spa_jax.decoding.sampling import Sampling
    from spa_jax.terminal import Mode

PROMPT = flags.DEFINE_string("prompt", None, "What to answer.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Hold a conversation on the terminal; /help shows its commands.")
READS_SPECIAL = flags.DEFINE_bool(
    "special_tokens",
    False,
    "Let the names of special tokens in prompts, such as <|im_end|>, be these tokens and not text.",
)
SETTING = flags.DEFINE_enum("setting", None, SETTINGS, "base: the backbone alone; by default the plugin's own.")
THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Ask the device where p(consult) is above it, from 0 to 1.", lower_bound=0, upper_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to generate.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Temperature of sampling; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k likeliest tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens whose probabilities reach p; 1 is all.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")
BEAMS = flags.DEFINE_integer("beams", 0, "Beam search with so many beams; 0 is sampling, or greedy.", lower_bound=0)
LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Beam search: above 0 favours longer answers.")
EARLY_STOPPING = flags.DEFINE_bool("early_stopping", False, "Beam search: stop when there are as many as beams.")
OUTPUT = flags.DEFINE_string("output", None, "File to write: JSON of text, tokens, sources and what they cost.")

CODEC = flags.DEFINE_enum("codec", "float32", CODECS, "How numbers travel between cloud and device.")
REPLY = flags.DEFINE_enum("reply", "correction", REPLIES, "What the device answers with: g, or the token it chose.")
TLS = flags.DEFINE_bool("tls", False, "Cloud on a network: speak TLS.")
INSECURE = flags.DEFINE_bool("insecure", False, "Cloud on a network: speak in the clear with other machines.")
CA = flags.DEFINE_string("ca", "", "Cloud on a network: PEM file of the authorities to trust; by default the system's.")
TOKEN_FILE = flags.DEFINE_string("token_file", "", "Cloud on a network: file with the token of this device.")
SILENCE = flags.DEFINE_float(
    "silence", Connection.silence, "Cloud on a network: seconds without a word from it after which it is dead."
)


def check() -> None:
    """Refuses what no model is needed to refuse.

    Raises:
        UserError: such a flag.
    """
    if PROMPT.value is not None:
        check_prompt(PROMPT.value)
    if BEAMS.value and TEMPERATURE.value:
        raise UserError("--beams searches and --temperature samples: give one of them")
    if INTERACTIVE.value and OUTPUT.value:
        raise UserError("--output goes with --prompt, not with --interactive")


def read_connection(address: str) -> Connection:
    """Makes the connection to a cloud.

    Raises:
        UserError: it would speak in the clear with another machine, or a file cannot be used.
    """
    check_address(address, TLS.value, INSECURE.value)
    return Connection(address, TLS.value, CA.value, read_token(TOKEN_FILE.value), silence=SILENCE.value).check()


def read_sampling() -> Sampling:
    """Makes the way of sampling.

    Raises:
        UserError: a value is out of range.
    """
    from spa_jax.decoding.sampling import Sampling

    return Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value).check()


def read_beams() -> Beams | None:
    """Makes the way of searching; None without a search."""
    from spa_jax.decoding.beam import Beams

    return Beams(BEAMS.value, LENGTH_PENALTY.value, EARLY_STOPPING.value) if BEAMS.value else None


def read_mode() -> Mode:
    """Makes the setting and the threshold."""
    from spa_jax.terminal import Mode

    return Mode(cast(Setting | None, SETTING.value), THRESHOLD.value)
