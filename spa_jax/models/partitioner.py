"""Where arrays lie on devices, as far as a model needs to know: it names the axes of what it computes by the letters of
its shapes. `spa_jax.training.sharding` says how a mesh splits them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Int

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Places arrays on a single device: every method returns its arrays as they are.

    `spa_jax.training.sharding.MeshPartitioner` overrides the methods for a mesh.
    """

    @property
    def batch_parts(self) -> int:
        """Number of equal parts that a batch is split into."""
        return 1

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return 1

    @property
    def platform(self) -> str:
        """Platform of the devices: `cpu`, `gpu` or `tpu`."""
        return jax.default_backend()

    def axis_size(self, letter: str) -> int:
        """Returns the parts into which `constrain` splits an axis whose size they divide."""
        return 1

    def shard_map(self, part: Callable[..., jax.Array], arguments: Sequence[str]) -> Callable[..., jax.Array]:
        """Makes a function that runs `part` on every device for the parts of its arguments that lie there.

        The arguments' axes are named as for `constrain`, and the result is split as the first argument is.
        """
        return part

    def constrain(self, x: jax.Array, axes: str) -> jax.Array:
        """Constrains where an activation, or a matrix that makes one, lies.

        `axes` names its leading axes by letters. B is split with the batch, and N, K, F and V with the parameters that
        have them; b is a batch split only between copies of the model, and d a width split as in parameters, for
        embeddings looked up where they lie. Any other letter, and `.`, is an axis that is not split, and so is one
        whose size does not divide.
        """
        return x

    def param_sharding(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
        """Returns the sharding of the parameter at a path such as `blocks/mlp/up/kernel`, None on a single device."""
        return None

    def shard_batch(self, batch: Tree) -> Tree:
        """Makes the global batch of a jitted program from NumPy arrays of this process's `local_rows`."""
        return batch

    def local_rows(self, count: int) -> Int[np.ndarray, " b"]:
        """Returns the indices, ascending, of the rows that this process loads of a batch of `count`."""
        return np.arange(count)

    def to_local(self, batch: Tree) -> Tree:
        """Undoes `shard_batch`: returns this process's rows of a batch on the devices, as NumPy arrays."""
        return jax.device_get(batch)

    def constrain_params(self, tree: Tree) -> Tree:
        """Constrains where parameters, or the parameters within a training state, lie: as `param_sharding` says."""
        return tree

    def gather(self, tree: Tree) -> Tree:
        """Gathers trainable parameters whole on every device; the backbone's stay split, and are gathered by block."""
        return tree


SINGLE_DEVICE = Partitioner()
