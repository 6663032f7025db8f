"""Where an endpoint listens; needs no slow imports, so that flags are checked before them."""

import socket

from spa_jax.errors import UserError
from spa_jax.split.grpc_channel import bind, is_loopback


def listen(address: str, has_key: bool) -> socket.socket:
    """Binds `host:port`, port 0 for any that is free.

    Raises:
        UserError: the address is none, is taken, or is beyond loopback without a key.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--http is '{address}': write HOST:PORT, such as 127.0.0.1:8471")
    if not is_loopback(host) and not has_key:
        raise UserError(
            f"--http={address} listens to other machines, and anybody there could use the plugins: name a file with a "
            "key by --http_key_file, or listen on 127.0.0.1"
        )
    return bind(address)
