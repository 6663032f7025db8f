"""HTTP/2 by hand, for what no client of gRPC does: to begin a call and say nothing, or to take no answer."""

import asyncio
import contextlib


@contextlib.asynccontextmanager
async def connection(port, window=65535):
    """A connection whose streams may be sent so many bytes each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"\0\4" + window.to_bytes(4, "big")))
    draining = asyncio.create_task(reader.read(-1))
    try:
        yield writer
    finally:
        writer.close()
        draining.cancel()


def call(number, path, *messages, token=""):
    """The bytes of the connection's call of this number, and of its messages."""
    fields = {
        ":method": "POST", ":scheme": "http", ":path": path, ":authority": "cloud", "te": "trailers",
        "content-type": "application/grpc",
    }  # fmt: skip
    if token:
        fields["authorization"] = f"Bearer {token}"
    header = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
    data = [_frame(0, 0, 2 * number + 1, b"\0" + len(each).to_bytes(4, "big") + each) for each in messages]
    return _frame(1, 4, 2 * number + 1, header) + b"".join(data)


def _text(text):
    return bytes([len(text)]) + text.encode()


def _frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
