"""Products with weights in half precision, summed in float32 and rounded once, forward and backward.

Accelerators sum so anyway. On a CPU, XLA has fast kernels for bfloat16 (AMX, AVX-512) only where a product's result is
float32; all others it computes in float32, which takes several times as long. What is no product it turns into float32
and back, at every step and often for whole arrays, so that activations better stay in float32 there.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

PRODUCT = "product"
"""Names results in half precision, for a checkpoint policy that keeps them: it does not know them for products."""


def linear(
    features: int | tuple[int, ...],
    *,
    weights_dtype: DTypeLike,
    use_bias: bool = False,
    axes: int = 1,
    name: str,
) -> nn.DenseGeneral:
    """Makes a linear layer of Flax that computes `product`; its output has the dtype of its input.

    Args:
        features: widths of its output.
        weights_dtype: dtype in which the weights are multiplied.
        use_bias: whether it adds a bias.
        axes: number of axes of its input that it sums over, the last ones.
        name: of its parameters.
    """

    def multiply(x: jax.Array, w: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return product(x, w, axes)

    return nn.DenseGeneral(
        features,
        tuple(range(-axes, 0)),
        use_bias=use_bias,
        dtype=weights_dtype,
        promote_dtype=_cast_weights,
        dot_general=multiply,
        name=name,
    )


def _cast_weights(x: Any, kernel: Any, bias: Any, *, dtype: Any, **_: Any) -> list[Any]:
    return [x, kernel.astype(dtype), None if bias is None else bias.astype(x.dtype)]


def product(
    x: jax.Array, w: jax.Array, count: int = 1, *, transposed: bool = False, out: DTypeLike | None = None
) -> jax.Array:
    """Multiplies x by weights.

    Args:
        x: input `[*M,*K]`, which is rounded to the weights' dtype.
        w: weights `[*K,*N]`.
        count: number of axes K.
        transposed: whether the weights are `[*N,*K]`.
        out: dtype of the result; by default that of x.

    Returns:
        `[*M,*N]`.
    """
    out = jnp.dtype(out or x.dtype)
    if w.dtype.itemsize > 2:
        axes = range(x.ndim)[-count:], _summed(w, count, transposed)
        return jax.lax.dot_general(x.astype(w.dtype), w, (axes, ((), ()))).astype(out)
    return checkpoint_name(_product(x, w, count, transposed, out), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: jax.Array, w: jax.Array, count: int, transposed: bool, out: jnp.dtype) -> jax.Array:
    return _sum_over(x.astype(w.dtype), w, range(x.ndim)[-count:], _summed(w, count, transposed)).astype(out)


def _forward(
    x: jax.Array, w: jax.Array, count: int, transposed: bool, out: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, w, count, transposed, out), (x, w)


def _backward(
    count: int, transposed: bool, out: jnp.dtype, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    rounded, g, rows = x.astype(w.dtype), g.astype(w.dtype), range(x.ndim - count)
    dx = _sum_over(g, w, range(len(rows), g.ndim), _summed(w, w.ndim - count, not transposed))
    dw = _sum_over(g, rounded, rows, rows) if transposed else _sum_over(rounded, g, rows, rows)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _summed(w: jax.Array, count: int, transposed: bool) -> range:
    return range(w.ndim)[-count:] if transposed else range(count)


def _sum_over(a: jax.Array, b: jax.Array, of_a: range, of_b: range) -> jax.Array:
    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=jnp.float32)

    def dot_of_two_rows(a: jax.Array, b: jax.Array) -> jax.Array:
        return dot(jnp.concatenate([a, a], axis=free[0]), b)[:1]

    free = [axis for axis in range(a.ndim) if axis not in of_a]
    if free and all(a.shape[axis] == 1 for axis in free):
        # On a CPU the kernel for one row is not the fast one, and takes ten times as long as that for two. A TPU's
        # compiler makes a product with a vector of one row, and first copies the weights into another layout for it.
        return jax.lax.platform_dependent(a, b, cpu=dot_of_two_rows, tpu=dot_of_two_rows, default=dot)
    return dot(a, b)


_product.defvjp(_forward, _backward)
