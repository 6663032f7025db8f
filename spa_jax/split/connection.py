"""How a device reaches its cloud."""

import dataclasses

import grpc

from spa_jax.errors import UserError
from spa_jax.split.grpc_channel import DEVICE_OPTIONS, MAX_BYTES_DOWN, read_tokens, trusted_roots


@dataclasses.dataclass(frozen=True)
class Connection:
    """The address of a cloud, and how to reach it.

    Attributes:
        address: `host:port`.
        tls: whether to speak TLS.
        ca: PEM file of the authorities to trust; empty for the system's.
        token: that this device shows; empty for none.
        patience: seconds to try to reconnect to a cloud that is gone, without anything new from it.
        queue_seconds: seconds to wait for room at a cloud that is busy.
        silence: seconds without any message after which a cloud is taken for dead; one that works says so every five.
        delay: seconds by which each answer is held back, as a slow network would.
    """

    address: str
    tls: bool = False
    ca: str = ""
    token: str = ""
    patience: float = 10.0
    queue_seconds: float = 60.0
    silence: float = 60.0
    delay: float = 0.0

    def check(self) -> "Connection":
        """Returns itself.

        Raises:
            UserError: the file of authorities holds none, or a time is not one.
        """
        if self.ca:
            trusted_roots(self.ca)
        for name, value in (("patience", self.patience), ("patience", self.queue_seconds), ("silence", self.silence)):
            if not value > 0:
                raise UserError(f"{name} is {value}, but must be above 0 seconds")
        return self

    def open(self, most_bytes: int = MAX_BYTES_DOWN) -> grpc.aio.Channel:
        """Opens a channel, which connects when it is first used, for messages of the cloud of so many bytes at most.

        Raises:
            UserError: the file of authorities holds none.
        """
        options = tuple((dict(DEVICE_OPTIONS) | {"grpc.max_receive_message_length": most_bytes}).items())
        if not self.tls:
            return grpc.aio.insecure_channel(self.address, options)
        roots = trusted_roots(self.ca) if self.ca else None
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(roots), options)


def read_token(path: str) -> str:
    """Reads the one token in a file; an empty path gives an empty token.

    Raises:
        UserError: the file cannot be read, or does not hold exactly one printable ASCII token.
    """
    if not path:
        return ""
    token, *others = read_tokens(path)
    if others:
        raise UserError(f"the token file '{path}' holds {1 + len(others)} tokens, and a device has one")
    return token
