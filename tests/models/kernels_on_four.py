"""The kernels that a device runs on its own part, on four devices: how far they are from XLA's on one, as JSON.

Splash attention runs by Pallas's interpreter; of cuDNN's only how it is split is true here, XLA's standing in for it.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import json

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.models import attention
from spa_jax.models.partitioner import SINGLE_DEVICE
from spa_jax.training.sharding import MeshConfig, MeshPartitioner, make_mesh

MESHES = {
    "heads split": (4, 1, 2, 2),
    "rows split": (4, 2, 2, 1),
    "more devices than key heads": (4, 1, 1, 4),
    "rows that do not divide": (3, 2, 1, 2),
}
"""Rows, and devices along data, fsdp and tensor."""
LENGTH, HEADS, KEY_HEADS, WIDTH = 100, 4, 2, 8


def difference(kernel: str, rows: int, *mesh: int) -> float:
    """The largest, of the output at real tokens and of the gradients."""
    rng = np.random.default_rng(0)
    shapes = [(rows, LENGTH, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    arrays = [jnp.asarray(np.float32(rng.standard_normal(shape))) for shape in shapes]
    real = jnp.arange(LENGTH) < jnp.asarray(rng.integers(1, LENGTH + 1, (rows, 1)))
    mask = (jnp.tri(LENGTH, dtype=bool) & real[:, None, :])[:, None]
    partitioner = MeshPartitioner(make_mesh(MeshConfig(*mesh, 1), rows, jax.devices()))

    def ours(*arrays: jax.Array) -> jax.Array:
        if kernel == "splash":
            return attention._splash(partitioner, *arrays, real)
        return attention._on_each_device(partitioner, attention._cudnn_part, *arrays, mask)

    def plain(*arrays: jax.Array) -> jax.Array:
        return attention.attend("xla", SINGLE_DEVICE, *arrays, mask, None)

    def outcome(attend, arrays):
        def summed(*arrays):
            out = jnp.where(real[:, :, None, None], attend(*arrays), 0)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(summed, (0, 1, 2), has_aux=True))(*arrays)

    found, wanted = (jax.device_get(outcome(attend, arrays)) for attend in (ours, plain))
    return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))


def without_cudnn(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


if __name__ == "__main__":
    attention._splash_part, attention._cudnn_part = attention.splash_on_cpu, without_cudnn
    every = {f"{k}, {name}": difference(k, *mesh) for k in ("splash", "cudnn") for name, mesh in MESHES.items()}
    print(json.dumps(every))
