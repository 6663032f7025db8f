"""All that a device says to the cloud, byte by byte: nothing of the side network is in it."""

import jax
import ml_dtypes
import numpy as np
import pytest
from google.protobuf.unknown_fields import UnknownFieldSet
from tiny_split import NEW, generate_and_record, make_plugin, make_prompts

from spa_jax.decoding.beam import Beams
from spa_jax.split.messages_pb2 import Open, Reply
from spa_jax.split.request import open_message

DTYPES = [np.dtype("<f4"), np.dtype(ml_dtypes.bfloat16), np.dtype("<f2")]


def _assert_nothing_unknown(message):
    assert len(UnknownFieldSet(message)) == 0
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                _assert_nothing_unknown(part)


def _pieces(array):
    """Each array, each of its rows and each of its columns, as bytes of each dtype a codec has."""
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    columns = np.moveaxis(array, -2, -1).reshape(-1, array.shape[-2]) if array.ndim > 1 else rows
    for dtype in DTYPES:
        for piece in [array, *rows, *columns]:
            data = piece.astype(dtype).tobytes()
            if len(data) > 3:  # fewer are found anywhere
                yield data


@pytest.mark.parametrize(("kind", "width"), [("tokenwise", None), ("transformer", 4)])
def test_no_side_parameter_crosses(kind, width, cloud):
    plugin, beams = make_plugin("spa", kind, seed=12), Beams(width) if width else None
    side = [np.asarray(leaf) for leaf in jax.tree.leaves(plugin.params["side"])]
    assert all(np.all(leaf != 0) for leaf in side)
    request = open_message(plugin, make_prompts(10), NEW, beams=beams)
    _, channel = generate_and_record(cloud, plugin, request)
    crossed = [request.SerializeToString(), *(answer for _, answer in channel.exchanged)]
    assert len(crossed) > 3
    for data, kind_of in zip(crossed, [Open, *[Reply] * len(channel.exchanged)]):
        message = kind_of.FromString(data)
        _assert_nothing_unknown(message)
        assert message.SerializeToString() == data
    together = b"".join(crossed)
    assert np.asarray(plugin.params["router"]["kernel"]).tobytes() in together, "the search finds nothing"
    pieces = [piece for leaf in side for piece in _pieces(leaf)]
    assert len(pieces) > 1000
    assert not any(piece in together for piece in pieces)


def test_a_setting_without_a_router_sends_none():
    plugin = make_plugin("spa")
    router = {name: np.asarray(leaf).tobytes() for name, leaf in plugin.params["router"].items()}
    for setting, sent in (("spa", True), ("s1", False), ("base", False)):
        request = open_message(plugin, make_prompts(1), NEW, setting=setting)
        assert (request.router, request.offset) == ((router["kernel"], router["offset"]) if sent else (b"", b""))
