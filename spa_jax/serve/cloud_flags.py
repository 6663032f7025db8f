"""Flags of `python -m spa_jax.serve cloud`."""

from typing import cast, get_args

from absl import flags

from spa_jax.choices import DTYPES
from spa_jax.errors import UserError
from spa_jax.models.compute import WEIGHTS
from spa_jax.split.admission import Limits
from spa_jax.split.grpc_channel import ServerSecurity, SharePrefixes, check_address, check_free

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
PORT = flags.DEFINE_integer("port", 8470, "Port to listen on; 0 for any that is free.")
METRICS_PORT = flags.DEFINE_integer("metrics_port", 0, "Port of Prometheus metrics; 0 for none.")
METRICS_HOST = flags.DEFINE_string("metrics_host", "", "Address of the metrics; by default that of --host.")
BACKBONE = flags.DEFINE_string("backbone", "smollm2-135m-instruct", "Name of a backbone, its directory or .gguf file.")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Dtype of the backbone; choose bfloat16 on GPUs and TPUs.")
PRECISION = flags.DEFINE_enum("weights", "float", WEIGHTS, "With int8 the backbone's matrices have 8 bits.")
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that every block is split over.", lower_bound=1)
TLS_CERT = flags.DEFINE_string("tls_cert", "", "PEM file of the certificate.")
TLS_KEY = flags.DEFINE_string("tls_key", "", "PEM file of its private key.")
TOKENS = flags.DEFINE_string("tokens", "", "File with one device token a line; none serves everybody.")
DEADLINE = flags.DEFINE_float("deadline", Limits.deadline, "Seconds a device has for an answer.")
FIRST_DEADLINE = flags.DEFINE_float(
    "first_deadline",
    Limits.first_deadline,
    "Seconds for its first answer of a kind, before which a device compiles.",
)
SESSIONS = flags.DEFINE_integer("sessions", Limits.sessions, "Most generations at once.")
SESSIONS_PER_TOKEN = flags.DEFINE_integer(
    "sessions_per_token", Limits.sessions_per_token, "Most generations at once of one device token."
)
LINGER = flags.DEFINE_float("linger", Limits.linger, "Seconds a finished answer is kept for a lost device.")
MEMORY = flags.DEFINE_float(
    "memory", Limits.memory / 2**30, "GiB of all generations at once, and of the cache that they share."
)
SHARE_PREFIXES = flags.DEFINE_enum(
    "share_prefixes",
    "all",
    get_args(SharePrefixes),
    "Who may begin with keys and values that were computed for others: all, those with the same token, or none.",
)
QUEUE = flags.DEFINE_integer("queue", Limits.queue, "Generations that may wait for room; 0 refuses at once.")
QUEUE_SECONDS = flags.DEFINE_float("queue_seconds", Limits.queue_seconds, "Seconds that each may wait for room.")
ABANDONED = flags.DEFINE_float(
    "abandoned", Limits.abandoned, "Seconds after which a generation ends that no device is attached to."
)
WARM = flags.DEFINE_integer(
    "warm",
    0,
    "Compile before serving what prompts and answers of so many tokens together need; 0 compiles when needed.",
    lower_bound=0,
)
DRAIN = flags.DEFINE_float(
    "drain", 10.0, "Seconds that generations under way have to end after a SIGTERM.", lower_bound=0
)
UNTIL_INPUT_ENDS = flags.DEFINE_bool(
    "until_input_ends", False, "Stop when standard input ends, as it does with the process at its other end."
)
INSECURE = flags.DEFINE_bool("insecure", False, "Speak in the clear with other machines.")
MOST_GIB = 2**20
"""More than any machine has."""


def check() -> None:
    """Refuses flags that no model is needed to refuse.

    Raises:
        UserError: such a flag.
    """
    read_limits()
    read_security()
    read_address()
    if METRICS_PORT.value and METRICS_PORT.value == PORT.value:
        raise UserError(f"--port and --metrics_port are both {PORT.value}: give the metrics another one")


def read_limits() -> Limits:
    """Makes the cloud's limits of its flags.

    Raises:
        UserError: nothing could be within one of them.
    """
    if not 0 < MEMORY.value < MOST_GIB:
        raise UserError(f"--memory is {MEMORY.value} GiB, but must be above 0 and below {MOST_GIB}")
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


def read_security() -> ServerSecurity:
    """Makes the cloud's certificate and tokens of its flags.

    Raises:
        UserError: their files cannot be used.
    """
    share = cast(SharePrefixes, SHARE_PREFIXES.value)
    return ServerSecurity(TLS_CERT.value, TLS_KEY.value, TOKENS.value, share).check()


def read_address() -> str:
    """Returns where the cloud is to listen.

    Raises:
        UserError: it would speak in the clear with other machines, or cannot listen there.
    """
    return check_free(check_address(f"{HOST.value}:{PORT.value}", bool(TLS_CERT.value), INSECURE.value))
