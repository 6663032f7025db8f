"""What a device believes of what its cloud says: nothing that it did not ask for."""

import math

from spa_jax.errors import UserError
from spa_jax.models.plugin import PluginConfig
from spa_jax.split import wire
from spa_jax.split.grpc_channel import MAX_BYTES_DOWN
from spa_jax.split.messages_pb2 import Generated, Open, Opened, Progress
from spa_jax.split.request import num_rows
from spa_jax.split.wire import WireError

MAX_TOKEN_BYTES = 1024
"""Most bytes of text that a token has on average."""
MAX_SESSION_NAME = 64
"""Most characters of a session's name."""
MAX_SAID = 300
"""Most characters of a cloud's own words that are shown."""


def words_of(text: str) -> str:
    """Makes one short line of what a cloud says in words."""
    line = " ".join(text[: 4 * MAX_SAID].split())
    return line if len(line) <= MAX_SAID else f"{line[:MAX_SAID]}..."


def cause_of(reason: str) -> str:
    """Returns the last part of what gRPC says of a cloud that it does not reach, such as `Connection refused`."""
    if reason.startswith(("failed to connect to all addresses", "errors resolving")):
        return reason.rstrip("]").rpartition(": ")[2]
    return reason


def most_bytes(config: PluginConfig, request: Open) -> int:
    """Computes how long a message of the cloud may be: of taps for this plugin and the progress of what was asked for,
    and no longer than any."""
    rows, new = num_rows(request), request.max_new_tokens
    positions = rows * (new + 1) if request.attends else rows
    if request.attends or request.edits == "all":
        positions = max(positions, wire.CHUNK_POSITIONS)
    numbers = 16  # row and position, as protobuf writes them
    taps = positions * (
        wire.bytes_per_position(wire.check_codec(request.codec), len(config.side.taps), config.hidden_size) + numbers
    )
    f = rows * (4 * config.hidden_size + numbers)
    progress = len(request.prompts) * new * (MAX_TOKEN_BYTES + numbers)
    return min(taps + f + progress + 2**16, MAX_BYTES_DOWN)


def check_opened(opened: Opened, request: Open) -> None:
    """Refuses a cloud of another protocol version or backbone.

    Raises:
        UserError: one of these differs; clouds that say no backbone have checked it themselves.
        WireError: the session has no name, or too long a one.
    """
    if opened.version != wire.VERSION:
        raise UserError(
            f"the cloud speaks version {opened.version} of the protocol and the device version {wire.VERSION}: "
            "install the same spa_jax on both"
        )
    if request.backbone and opened.backbone and opened.backbone != request.backbone:
        raise UserError(
            f"the cloud runs a backbone with fingerprint {words_of(opened.backbone)}, and the plugin was trained on "
            f"one with fingerprint {request.backbone}: use a cloud that has that one"
        )
    if not 0 < len(opened.session) <= MAX_SESSION_NAME:
        raise WireError(f"the cloud names a session by {len(opened.session)} characters")


def most_questions(request: Open, lengths: int) -> int:
    """Computes how many questions a cloud may ask about prompts of so many tokens together: one for every token at
    most, old or new."""
    return lengths + len(request.prompts) * request.max_new_tokens


def check_progress(previous: Progress, new: Progress, request: Open) -> None:
    """Refuses a progress that does not go on from the one before, or goes beyond what was asked for.

    Args:
        previous: all that was generated before.
        new: as it came, without what the stream has brought before.
        request: what was asked for.

    Raises:
        WireError: the progress makes no sense, and nothing of it may be used.
    """
    prompts = len(request.prompts)
    if len(new.generated) != prompts:
        raise WireError(f"the cloud tells of {len(new.generated)} generations, and {prompts} were asked for")
    if new.degraded > prompts * request.max_new_tokens or new.uncorrected_prompts > prompts:
        raise WireError("the cloud tells of more degraded tokens or prompts than there can be")
    for number, generated in enumerate(new.generated):
        old = previous.generated[number] if previous.generated else Generated()
        _check_generated(old, generated, new.done, request.max_new_tokens)
        if generated.stopped and not request.stop:
            raise WireError("the cloud says that a text has ended an answer, and none was to")


def _check_generated(old: Generated, new: Generated, done: bool, most: int) -> None:
    begin, count = new.begin, new.begin + len(new.tokens)
    if begin not in (0, len(old.tokens)):
        raise WireError(f"the cloud goes on at token {begin}, and it has sent {len(old.tokens)}")
    if count > most:
        raise WireError(f"the cloud sends {count} tokens, and at most {most} were asked for")
    if len(new.consulted) != len(new.tokens):
        raise WireError(f"the cloud says of {len(new.consulted)} tokens who chose them, and sends {len(new.tokens)}")
    for values in (new.logprobs, new.p_consult, new.waits):
        if len(values) not in (0, len(new.tokens)):
            raise WireError(f"the cloud describes {len(values)} tokens, and sends {len(new.tokens)}")
    if not all(0 <= p <= 1 for p in new.p_consult) or not all(0 <= wait < math.inf for wait in new.waits):
        raise WireError("the cloud sends probabilities or times that are none")
    pieces = len(new.pieces) + (len(old.pieces) if begin else 0)
    is_whole = pieces == count and (count > 0 or new.stopped)
    if pieces > count or (done and not is_whole):
        raise WireError(f"the cloud sends {pieces} pieces of text and {count} tokens{' at the end' if done else ''}")
    if sum(map(len, new.pieces)) > MAX_TOKEN_BYTES * count:
        raise WireError(f"the cloud sends {count} tokens with more text than tokens have")
    if not begin and (
        new.tokens[: len(old.tokens)] != old.tokens or new.pieces[: len(old.pieces)] != old.pieces
    ):  # also where there are fewer than before
        raise WireError("the cloud takes back tokens that it has sent")
    if not math.isfinite(new.score):
        raise WireError("the cloud sends a score that is not finite")


def merge_progress(previous: Progress, new: Progress) -> Progress:
    """Returns `new` with the tokens before its own, which it leaves out, taken from `previous`."""
    for old, generated in zip(previous.generated, new.generated):
        begin = generated.begin
        generated.begin = 0
        for name in ("tokens", "consulted", "pieces", "logprobs", "p_consult", "waits"):
            values = [*getattr(old, name)[:begin], *getattr(generated, name)]
            del getattr(generated, name)[:]
            getattr(generated, name).extend(values)
    return new
