"""Settings that both ends of the gRPC connection share: method, limits, keepalive and credentials."""

import dataclasses
import ipaddress
import ssl
from pathlib import Path

import grpc

from spa_jax.errors import UserError

SERVICE, METHOD = "spa_jax.Cloud", "Generate"
MAX_BYTES_DOWN, MAX_BYTES_UP = 64 * 2**20, 8 * 2**20
"""Most bytes of a message from the cloud and from a device; a longer one ends its stream."""
KEEPALIVE: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
OLD_CONNECTION: tuple[tuple[str, int], ...] = (
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
)
"""Closes old connections, after which devices reconnect; nothing else ends a stream that is alive and never read."""
CLOUD_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BYTES_UP), ("grpc.max_send_message_length", MAX_BYTES_DOWN),
    ("grpc.so_reuseport", 0), *KEEPALIVE, *OLD_CONNECTION
)  # fmt: skip
DEVICE_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BYTES_DOWN), ("grpc.max_send_message_length", MAX_BYTES_UP), *KEEPALIVE
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ServerSecurity:
    """The certificate of a cloud, and the devices that it serves.

    Attributes:
        cert: PEM file of the certificate chain; with `key`, TLS.
        key: PEM file of its private key.
        tokens: file with one device token a line; without one everybody is served.
    """

    cert: str = ""
    key: str = ""
    tokens: str = ""

    def credentials(self) -> grpc.ServerCredentials | None:
        """Reads the certificate and its key; None without TLS.

        Raises:
            UserError: one file without the other, or they hold no certificate with its key.
        """
        if bool(self.cert) != bool(self.key):
            raise UserError("TLS needs both --tls_cert and --tls_key")
        if not self.cert:
            return None
        key, cert = read_file(self.key), read_file(self.cert)
        try:  # gRPC's own error would say that it cannot listen
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise UserError(
                f"'{self.cert}' and '{self.key}' are no certificate and its key, both as PEM and the key without a "
                f"password: {error}"
            ) from error
        return grpc.ssl_server_credentials([(key, cert)])

    def device_tokens(self) -> frozenset[str] | None:
        """Reads the tokens of the devices that are served; None if all are.

        Raises:
            UserError: the file cannot be read, is empty, or holds a token that is not printable ASCII.
        """
        return frozenset(read_tokens(self.tokens)) if self.tokens else None


def check_address(address: str, tls: bool, insecure: bool) -> str:
    """Returns the address, unless it would mean to speak in the clear with another machine.

    Raises:
        UserError: it is not `host:port`, or another machine without TLS and without `insecure`.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise UserError(f"'{address}' is no address: write host:port")
    if not tls and not insecure and not _is_loopback(host):
        raise UserError(
            f"without TLS prompts and tokens would cross the network to {host} in the clear: give certificates "
            "(--tls_cert and --tls_key on the cloud, --tls on the device), or insist with --insecure"
        )
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(path: str) -> list[str]:
    """Reads the tokens in a file, one on each line that is not blank.

    Raises:
        UserError: the file cannot be read, is empty, or holds a token that is not printable ASCII.
    """
    found = [line.strip() for line in read_file(path).decode(errors="replace").splitlines() if line.strip()]
    if not found:
        raise UserError(f"the token file '{path}' is empty: write one token a line")
    if not all(token.isascii() and token.isprintable() for token in found):
        raise UserError(f"the token file '{path}' holds a token with characters that are not printable ASCII")
    return found


def trusted_roots(path: str) -> bytes:
    """Reads the PEM file of the authorities to trust.

    Raises:
        UserError: it cannot be read, or holds no certificate.
    """
    roots = read_file(path)
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        raise UserError(f"'{path}' holds no certificates as PEM: {error}") from error
    return roots


def read_file(path: str) -> bytes:
    """Reads a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
