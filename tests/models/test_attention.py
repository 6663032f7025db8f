"""Every kernel of attention against a softmax written out in NumPy."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_jax.compiling.hlo import cost
from spa_jax.errors import UserError
from spa_jax.models import attention
from spa_jax.models.attention import attend, attend_shared, select_kernel, splash_on_cpu
from spa_jax.models.compute import Compute
from spa_jax.models.partitioner import SINGLE_DEVICE
from tests.models.platforms import OtherPlatform


def softmax_attention(q, k, v, mask):
    """float64, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    shared = q.shape[2] // k.shape[2]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, 0, t])
        if len(seen):
            scores = k[b, seen, n // shared] @ q[b, t, n] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = (weights / weights.sum()) @ v[b, seen, n // shared]
    return out


def draw(seed, rows, length, keys, heads, groups, width):
    rng = np.random.default_rng(seed)
    shapes = ((rows, length, heads, width), (rows, keys, groups, width), (rows, keys, groups, width))
    return [jnp.asarray(np.float32(rng.standard_normal(shape))) for shape in shapes]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(("platform", "most"), [("cpu", 2**22), ("cpu", 0), ("tpu", 0), ("gpu", 0)])
def test_rows_of_a_shared_cache_see_its_slots_from_where_they_begin(platform, most, length, monkeypatch):
    monkeypatch.setattr(attention, "MAX_COPY", most)
    q, *_ = draw(0, 3, length, 1, 6, 2, 4)
    cached, seen, begins = draw(1, 2, 40, 40, 2, 2, 4)[1:], 7, np.array([30, 2, 33], np.int32)
    mask = np.random.default_rng(2).random((3, 1, length, seen)) < 0.6
    mask[..., 0] = True
    apply = jax.jit(functools.partial(attend_shared, OtherPlatform(platform)))
    found = apply(q, *cached, jnp.int32(1), begins, mask)
    k, v = (np.stack([each[1, begin : begin + seen] for begin in begins]) for each in cached)
    np.testing.assert_allclose(np.asarray(found), softmax_attention(q, k, v, mask), atol=1e-5)


@settings(max_examples=20)
@given(
    st.integers(0, 99),
    st.integers(1, 3),
    st.integers(2, 13),
    st.integers(1, 15),
    st.sampled_from([(4, 4), (6, 2), (3, 1)]),
)
def test_blockwise_is_a_softmax_for_any_lengths_and_mask(seed, rows, length, keys, heads):
    q, k, v = draw(seed, rows, length, keys, *heads, 4)
    mask = np.random.default_rng(seed).random((rows, 1, length, keys)) < 0.6
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "BLOCK_SCORES", heads[0] * keys * 3)  # three queries a block
        found = np.asarray(jax.jit(functools.partial(attend, "blockwise", SINGLE_DEVICE))(q, k, v, mask, None))
    sees_any = mask.any(axis=3)[:, 0]
    np.testing.assert_allclose(found[sees_any], softmax_attention(q, k, v, mask)[sees_any], atol=1e-5)
    assert np.isfinite(found).all()


def padded(seed, rows, length):
    """Real tokens with padding on either side of them, and the mask of those before each."""
    begin, end = np.sort(np.random.default_rng(seed).integers(0, length + 1, (2, rows)), axis=0)[:, :, None]
    real = (begin <= np.arange(length)) & (np.arange(length) < end)
    return real, (np.tri(length, dtype=bool) & real[:, None, :])[:, None]


@settings(max_examples=12)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 21), st.sampled_from([(4, 4), (6, 2), (3, 1)]))
def test_blockwise_is_a_causal_softmax_that_sees_no_padding(seed, rows, length, heads):
    """Also where there are fewer queries than parts, or more in a part than in a block."""
    q, k, v = draw(seed, rows, length, length, *heads, 4)
    real, mask = padded(seed, rows, length)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "BLOCK_SCORES", heads[0] * length * 2)  # two queries a block, or a few more
        found = np.asarray(jax.jit(functools.partial(attend, "blockwise", SINGLE_DEVICE))(q, k, v, mask, real))
    np.testing.assert_allclose(found[real], softmax_attention(q, k, v, mask)[real], atol=1e-5)
    assert np.isfinite(found).all()


def summed(kernel, mask, real, q, k, v):
    """A number with a gradient in every real token."""
    mixed = jnp.sin(attend(kernel, SINGLE_DEVICE, q, k, v, mask, real))
    return jnp.sum(mixed if real is None else jnp.where(real[:, :, None, None], mixed, 0))


@pytest.mark.parametrize("causal", [False, True])
def test_blockwise_has_the_gradient_of_xla(causal):
    q, k, v = draw(3, 3, 11, 11 if causal else 12, 6, 2, 4)
    real, mask = map(jnp.asarray, padded(4, 3, 11))
    if not causal:
        real, mask = None, jnp.asarray(np.random.default_rng(3).random((1, 1, 11, 12)) < 0.7)  # one for all rows
    ours, theirs = (
        jax.jit(jax.grad(summed, (3, 4, 5)), static_argnums=0)(kernel, mask, real, q, k, v)
        for kernel in ("blockwise", "xla")
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, theirs)


def test_blockwise_leaves_hidden_keys_alone_and_keeps_no_scores_for_a_gradient():
    q, k, v = draw(6, 2, 256, 256, 4, 2, 8)
    mask, real = jnp.ones((2, 1, 256, 256), bool), jnp.ones((2, 256), bool)

    def compiled(real):
        gradient = jax.grad(functools.partial(summed, "blockwise", mask, real), (0, 1, 2))
        return jax.jit(gradient).lower(q, k, v).compile()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "BLOCK_SCORES", 4 * 256 * 16)
        some, every = compiled(real), compiled(None)
    ratio = cost(some.as_text()).flops / cost(every.as_text()).flops
    assert ratio == pytest.approx((attention.CAUSAL_PARTS + 1) / (2 * attention.CAUSAL_PARTS), rel=0.01)
    scores = 2 * 4 * 256 * 256 * 4
    assert max(program.memory_analysis().temp_size_in_bytes for program in (some, every)) < scores / 2


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_splash_is_a_causal_softmax_that_sees_no_padding(heads):
    """By Pallas's interpreter; real tokens on either side of the padding."""
    q, k, v = draw(5, 2, 128, 128, *heads, 16)
    real = np.ones((2, 128), bool)
    real[0, 100:] = real[1, :7] = False
    mask = (np.tri(128, dtype=bool) & real[:, None, :])[:, None]
    found = np.asarray(splash_on_cpu(q * 0.25, k, v, jnp.asarray(real, jnp.int32)))
    np.testing.assert_allclose(found[real], softmax_attention(q, k, v, mask)[real], atol=5e-5)

    def summed(part, q, k, v):
        return jnp.sum(jnp.where(real[:, :, None, None], jnp.sin(part(q, k, v)), 0))

    def splash(q, k, v):
        return splash_on_cpu(q * 0.25, k, v, jnp.asarray(real, jnp.int32))

    def plain(q, k, v):
        return attend("xla", SINGLE_DEVICE, q, k, v, jnp.asarray(mask), None)

    ours, theirs = (jax.grad(functools.partial(summed, part), (0, 1, 2))(q, k, v) for part in (splash, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-5), ours, theirs)


@pytest.mark.slow
def test_a_kernel_on_four_devices_is_xla_on_one():
    """Forward and backward, splash padded to the lanes of a TPU."""
    command = [sys.executable, "-m", "tests.models.kernels_on_four"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    differences = json.loads(done.stdout)
    assert len(differences) == 8
    assert max(differences.values()) < 5e-5, differences


def test_each_platform_has_its_kernel():
    def auto(platform, dtype=jnp.float32, num_devices=1, width=64, scores=10**6, causal=True):
        return select_kernel("auto", OtherPlatform(platform, num_devices), jnp.dtype(dtype), width, scores, causal)

    assert (auto("cpu"), auto("tpu"), auto("gpu"), auto("gpu", jnp.bfloat16)) == ("blockwise", "splash", "xla", "cudnn")
    assert auto("cpu", num_devices=8) == auto("cpu", scores=1000) == "xla"
    assert auto("gpu", jnp.bfloat16, width=12) == auto("gpu", jnp.bfloat16, width=256) == "xla"
    assert auto("cpu", causal=False) == "blockwise"
    assert {auto(platform, jnp.bfloat16, causal=False) for platform in ("tpu", "gpu")} == {"xla"}
    assert {auto(platform, jnp.bfloat16, scores=0) for platform in ("cpu", "tpu", "gpu")} == {"xla"}


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_of_another_platform_is_refused(kernel):
    with pytest.raises(UserError, match=f"compute.attention={kernel} needs a .PU.*this is a cpu"):
        select_kernel(kernel, OtherPlatform("cpu"), jnp.dtype(jnp.bfloat16), 64, 10**6, True)
    with pytest.raises(UserError, match="dtype=bfloat16"):
        select_kernel("cudnn", OtherPlatform("gpu"), jnp.dtype(jnp.float32), 64, 10**6, True)


def test_no_blocks_in_a_turn_is_refused():
    with pytest.raises(UserError, match=r"compute\.unroll"):
        Compute(unroll=0)
