"""Settings that both ends of the gRPC connection share: method, limits, keepalive and credentials."""

import dataclasses
import ipaddress
import socket
import ssl
from pathlib import Path
from typing import Literal

import grpc

from spa_jax.errors import UserError
from spa_jax.split.rereading import Reread

SERVICE, METHOD = "spa_jax.Cloud", "Generate"
PREFIX_HEADER = "spa-prefix"
"""Metadata key under which a device says what its prompt begins with, for a proxy in front of several clouds."""
MAX_BYTES_DOWN, MAX_BYTES_UP = 64 * 2**20, 8 * 2**20
"""Most bytes of a message from the cloud and from a device; a longer one ends its stream."""
MAX_BYTES_OPEN = 2 * 2**20
"""Most bytes of the message that opens a session: prompts of `MAX_PROMPT_SIZE` and a router fit."""
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
MAX_STREAMS = 128
"""Most streams of one connection to a cloud: gRPC keeps one that does not listen until its connection ends."""
CLOUD_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BYTES_UP), ("grpc.max_send_message_length", MAX_BYTES_DOWN),
    ("grpc.max_concurrent_streams", MAX_STREAMS), ("grpc.so_reuseport", 0), *KEEPALIVE, *OLD_CONNECTION
)  # fmt: skip
DEVICE_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BYTES_DOWN), ("grpc.max_send_message_length", MAX_BYTES_UP), *KEEPALIVE
)  # fmt: skip


SharePrefixes = Literal["all", "token", "none"]


@dataclasses.dataclass(frozen=True)
class ServerSecurity:
    """The certificate of a cloud, and the devices that it serves.

    Attributes:
        cert: PEM file of the certificate chain; with `key`, TLS.
        key: PEM file of its private key.
        tokens: file with one device token a line; without one everybody is served.
        share_prefixes: who may begin with keys and values that were computed for others: all, those with the same
            token, or none.
    """

    cert: str = ""
    key: str = ""
    tokens: str = ""
    share_prefixes: SharePrefixes = "all"

    def credentials(self) -> grpc.ServerCredentials | None:
        """Reads the certificate and its key, and again, as long as the cloud runs, for the first connection after they
        changed; None without TLS.

        Raises:
            UserError: one file without the other, or they hold no certificate with its key.
        """
        if bool(self.cert) != bool(self.key):
            raise UserError("TLS needs both --tls_cert and --tls_key")
        if not self.cert:
            return None
        files = Reread([self.cert, self.key], self._certificate)
        return grpc.dynamic_ssl_server_credentials(files.value, lambda: files.value if files.refresh() else None)

    def _certificate(self) -> grpc.ServerCertificateConfiguration:
        """Reads the certificate and its key.

        Raises:
            UserError: they are none.
        """
        key, cert = read_file(self.key), read_file(self.cert)
        try:  # gRPC's own error would say that it cannot listen
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, password="")
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{self.cert}' and '{self.key}' are no certificate and its key, both as PEM and the key without a "
                f"password: {error}"
            ) from error
        return grpc.ssl_server_certificate_configuration([(key, cert)])

    def check(self) -> "ServerSecurity":
        """Returns itself, where its files can be used.

        Raises:
            UserError: they cannot, or prefixes are to be shared by tokens without any.
        """
        if self.share_prefixes == "token" and not self.tokens:
            raise UserError("--share_prefixes=token needs the devices' tokens: name their file with --tokens")
        self.credentials()
        self.device_tokens()
        return self

    def namespace(self, token: str) -> str | None:
        """Names those with whom a device shares what prompts begin with; None for nobody."""
        return {"all": "", "token": token, "none": None}[self.share_prefixes]

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
    if not tls and not insecure and not is_loopback(host):
        raise UserError(
            f"without TLS prompts and tokens would cross the network to {host} in the clear: give certificates "
            "(--tls_cert and --tls_key on the cloud, --tls on the device), or insist with --insecure"
        )
    return address


def bind(address: str) -> socket.socket:
    """Listens on an address, port 0 for any that is free.

    Raises:
        UserError: it is taken, or not of this machine.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.getaddrinfo(host, int(port))[0][0]
        return socket.create_server((host, int(port)), family=family)
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        raise UserError(f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}") from error


def check_free(address: str) -> str:
    """Returns the address, where a cloud can listen on it.

    Raises:
        UserError: it is taken, or not of this machine.
    """
    bind(address).close()
    return address


def is_loopback(host: str) -> bool:
    """Tells whether an address leads to this machine alone."""
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
