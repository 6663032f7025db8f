"""Products with weights in half precision, summed in float32 and rounded once, forward and backward.

Accelerators sum so anyway. On a CPU, XLA has fast kernels for bfloat16 (AMX, AVX-512) only where a product's result is
float32; all others it computes in float32, which takes several times as long.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def dot_general(
    x: jax.Array, w: jax.Array, dimension_numbers: Any, *_: Any, out: DTypeLike | None = None, **__: Any
) -> jax.Array:
    """Computes `product` for a linear layer of Flax, in place of `jax.lax.dot_general`."""
    return product(x, w, len(dimension_numbers[0][0]), out=out)


def product(
    x: jax.Array, w: jax.Array, count: int = 1, *, transposed: bool = False, out: DTypeLike | None = None
) -> jax.Array:
    """Multiplies x by weights.

    Args:
        x: input `[*M,*K]`.
        w: weights `[*K,*N]` of the same dtype.
        count: number of axes K.
        transposed: whether the weights are `[*N,*K]`.
        out: dtype of the result; by default that of x.

    Returns:
        `[*M,*N]`.
    """
    out = jnp.dtype(out or x.dtype)
    if x.dtype.itemsize > 2:
        return jax.lax.dot_general(x, w, ((range(x.ndim)[-count:], _summed(w, count, transposed)), ((), ()))).astype(
            out
        )
    return _product(x, w, count, transposed, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: jax.Array, w: jax.Array, count: int, transposed: bool, out: jnp.dtype) -> jax.Array:
    return _sum_over(x, w, range(x.ndim)[-count:], _summed(w, count, transposed)).astype(out)


def _forward(
    x: jax.Array, w: jax.Array, count: int, transposed: bool, out: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, w, count, transposed, out), (x, w)


def _backward(
    count: int, transposed: bool, out: jnp.dtype, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g, rows = g.astype(x.dtype), range(x.ndim - count)
    dx = _sum_over(g, w, range(len(rows), g.ndim), _summed(w, w.ndim - count, not transposed))
    dw = _sum_over(g, x, rows, rows) if transposed else _sum_over(x, g, rows, rows)
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
        # On a CPU the kernel for one row is not the fast one, and takes ten times as long as that for two.
        return jax.lax.platform_dependent(a, b, cpu=dot_of_two_rows, default=dot)
    return dot(a, b)


_product.defvjp(_forward, _backward)
