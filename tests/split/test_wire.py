"""Codecs against closed forms, and bytes that are not what they should be."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spa_jax.errors import UserError
from spa_jax.split.messages_pb2 import Tensor
from spa_jax.split.wire import (
    CODECS,
    DTYPES,
    WireError,
    bytes_per_position,
    check_codec,
    decode,
    encode,
    pack,
    to_host,
    unpack,
)

SHAPE = (5, 3, 8)
"""M positions, P taps, D."""
FLOATS = arrays.arrays(np.float32, SHAPE, elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False))
SMALL = arrays.arrays(np.float32, SHAPE, elements=st.floats(-60000, 60000, width=32, allow_subnormal=False))
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half a unit in the last place, relative."""


def _through(codec, x):
    """There and back over the wire."""
    tensor = Tensor.FromString(pack(to_host(encode(codec, x))).SerializeToString())
    return np.asarray(decode(unpack(codec, tensor, x.shape), np.float32))


@settings(max_examples=50)
@given(FLOATS)
def test_float32_is_exact(x):
    np.testing.assert_array_equal(_through("float32", x), x)


@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
@settings(max_examples=50)
@given(x=SMALL)
def test_half_precision_is_off_by_its_rounding(codec, x):
    smallest = {"bfloat16": 0.0, "float16": 2.0**-25}[codec]
    assert (np.abs(_through(codec, x) - x) <= np.abs(x) * ROUNDING[codec] + smallest).all()


def test_float16_clips_what_it_cannot_hold():
    x = np.array([[1e9, -1e9, 65504.0, 65519.0]], np.float32)
    np.testing.assert_array_equal(_through("float16", x), [[65504, -65504, 65504, 65504]])


@settings(max_examples=50)
@given(FLOATS)
def test_int8_is_off_by_half_a_step_of_its_vector(x):
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    subnormal = 127 * np.finfo(np.float32).tiny  # of a vector below it not even the scale is there
    error = np.abs(_through("int8", x).astype(np.float64) - x)
    assert (error <= step * (0.5 + 1e-4) + subnormal).all()


def test_int8_keeps_zero_vectors_and_the_largest_numbers_of_others():
    x = np.zeros((4, 8), np.float32)
    x[1, 3], x[2, 0], x[3] = -7.5, 1e-20, np.linspace(-127, 127, 8)
    np.testing.assert_allclose(_through("int8", x), np.where(np.arange(4)[:, None] == 3, np.round(x), x), rtol=1e-6)
    encoded = to_host(encode("int8", x))
    np.testing.assert_array_equal(encoded.values[3], np.round(x[3]))
    np.testing.assert_allclose(encoded.scales, [0, 7.5 / 127, 1e-20 / 127, 1], rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=25)
@given(data=st.data())
def test_unpack_is_the_inverse_of_pack(codec, data):
    shape = data.draw(arrays.array_shapes(min_dims=2, max_dims=4, max_side=5))
    x = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32)))
    scales = None
    if codec == "int8":
        x, scales = np.clip(x, -127, 127), np.abs(x[..., 0])
    encoded = type(to_host(encode(codec, np.zeros((1, 1), np.float32))))(x.astype(DTYPES[codec]), scales)
    again = unpack(codec, pack(encoded), shape)
    np.testing.assert_array_equal(again.values, encoded.values)
    assert again.values.dtype == encoded.values.dtype
    assert (again.scales is None) == (scales is None)
    if scales is not None:
        np.testing.assert_array_equal(again.scales, scales)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_as_promised_and_any_other_number_of_them_is_refused(codec):
    tensor = pack(to_host(encode(codec, np.ones(SHAPE, np.float32))))
    assert len(tensor.values) + len(tensor.scales) == SHAPE[0] * bytes_per_position(codec, *SHAPE[1:])
    has = rf"where {codec} of shape \(5, 3, 8\) has {len(tensor.values)} and {len(tensor.scales)}"
    for wrong in (
        Tensor(values=tensor.values[:-1], scales=tensor.scales),
        Tensor(values=tensor.values + b"0", scales=tensor.scales),
        Tensor(values=tensor.values, scales=tensor.scales + b"0000"),
        Tensor(scales=tensor.scales),
    ):
        with pytest.raises(WireError, match=f"{len(wrong.values)} bytes and {len(wrong.scales)} of scales .*{has}"):
            unpack(codec, wrong, SHAPE)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_numbers_that_are_not_finite_are_refused(codec, number):
    encoded = to_host(encode(codec, np.ones(SHAPE, np.float32)))
    spoilt = np.array(encoded.values if codec != "int8" else encoded.scales)
    spoilt.reshape(-1)[7] = number
    encoded = encoded._replace(**{"values" if codec != "int8" else "scales": spoilt})
    with pytest.raises(WireError, match="not finite"):
        unpack(codec, pack(encoded), SHAPE)


def test_the_bytes_are_little_endian():
    x = np.array([[1.0, -2.0]], np.float32)
    assert pack(to_host(encode("float32", x))).values == bytes.fromhex("0000803f000000c0")
    assert pack(to_host(encode("bfloat16", x))).values == bytes.fromhex("803f00c0")
    assert pack(to_host(encode("float16", x))).values == bytes.fromhex("003c00c0")
    tensor = pack(to_host(encode("int8", x)))
    assert (tensor.values, tensor.scales) == (bytes([64, 129]), np.float32(2 / 127).tobytes())
    assert DTYPES["bfloat16"] == ml_dtypes.bfloat16


def test_an_unknown_codec_is_refused_with_the_known_ones():
    assert [check_codec(codec) for codec in CODECS] == list(CODECS)
    with pytest.raises(UserError, match="codec 'float64' is unknown; choices are float32, bfloat16, float16, int8"):
        check_codec("float64")
