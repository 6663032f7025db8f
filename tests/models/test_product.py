"""Products in half precision against the same in float64, and the dtypes that make them fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.models.llama import REMAT_POLICIES
from spa_jax.models.product import product

CASES = [
    ((3, 5, 8), (8, 6), 1, False),
    ((1, 1, 8), (8, 6), 1, False),
    ((3, 4, 2, 5), (2, 5, 7), 2, False),
    ((1, 2, 5), (2, 5, 3, 7), 2, False),
    ((3, 8), (9, 8), 1, True),
    ((1, 8), (9, 8), 1, True),
]


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def exact(x, w, count, transposed):
    """The product and its gradients for a cotangent of ones, in float64."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    w = np.moveaxis(w, range(w.ndim - count), range(count - w.ndim, 0)) if transposed else w
    inner, rows = int(np.prod(w.shape[:count])), x.shape[: x.ndim - count]
    x2, w2 = x.reshape(-1, inner), w.reshape(inner, -1)
    ones = np.ones((len(x2), w2.shape[1]))
    dw = (x2.T @ ones).reshape(w.shape)
    dw = np.moveaxis(dw, range(count), range(-count, 0)) if transposed else dw
    return (x2 @ w2).reshape(*rows, *w.shape[count:]), (ones @ w2.T).reshape(x.shape), dw


@pytest.mark.parametrize(("x", "w", "count", "transposed"), CASES)
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", None)])
def test_a_product_in_half_precision_is_rounded_once(x, w, count, transposed, dtype, out):
    x, w = random(x, 1).astype(dtype), random(w, 2)
    found, pull_back = jax.vjp(lambda x, w: product(x, w, count, transposed=transposed, out=out), x, w)
    assert found.dtype == (out or dtype)
    half_a_bit = {jnp.dtype(jnp.bfloat16): 2.0**-8, jnp.dtype(jnp.float32): 1e-6}
    for value, wanted in zip((found, *pull_back(jnp.ones_like(found))), exact(x, w, count, transposed), strict=True):
        assert value.shape == wanted.shape
        np.testing.assert_allclose(np.asarray(value, np.float64), wanted, rtol=half_a_bit[value.dtype], atol=1e-5)


def dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield {v.aval.dtype for v in eqn.invars}, eqn.outvars[0].aval.dtype
        for inner in eqn.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


def test_every_product_forward_and_backward_is_of_halves_and_gives_float32():
    def loss(x, w):
        return jnp.sum(product(product(x, w), w, transposed=True, out=jnp.float32))

    found = list(dots(jax.make_jaxpr(jax.grad(loss, (0, 1)))(random((3, 8), 1), random((8, 6), 2)).jaxpr))
    assert len(found) == 6
    assert all(each == ({jnp.dtype(jnp.bfloat16)}, jnp.dtype(jnp.float32)) for each in found)


def test_an_input_in_float32_is_rounded_to_the_weights():
    x, w = jnp.float32([[1 + 2.0**-10, 2]]), jnp.ones((2, 3), jnp.bfloat16)
    np.testing.assert_array_equal(product(x, w), np.full((1, 3), 3, np.float32))


def test_a_checkpoint_of_products_keeps_those_in_half_precision():
    """It computes none of them again."""
    w = random((8, 8), 2)

    def count(policy):
        layer = jax.checkpoint(lambda x: jnp.tanh(product(jnp.tanh(product(x, w)), w)), policy=policy)
        return len(list(dots(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(layer(x))))(random((3, 8), 1)).jaxpr)))

    assert count(REMAT_POLICIES["full"]) - count(REMAT_POLICIES["dots"]) == 2


def test_a_product_in_float32_is_that_of_jax():
    x, w = (random(shape, 3).astype(jnp.float32) for shape in ((3, 8), (8, 6)))
    assert jnp.array_equal(product(x, w), x @ w)
