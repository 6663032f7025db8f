"""How arrays lie on devices, as far as a model needs to know: it names the axes of what it computes by the letters of
its shapes. What a letter means on a mesh is said in `spa_jax.training.sharding`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Int

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Of one device, where there is nothing to say: everything is returned as it is."""

    @property
    def batch_parts(self) -> int:
        """Equal parts that the batch is split into."""
        return 1

    @property
    def num_devices(self) -> int:
        """How many there are."""
        return 1

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return jax.default_backend()

    def axis_size(self, letter: str) -> int:
        """Parts that an axis of activations is split into where it divides, see `__call__`."""
        return 1

    def shard_map(self, part: Callable[..., jax.Array], arguments: Sequence[str]) -> Callable[..., jax.Array]:
        """A function that does on every device, with what lies there, what `part` does; axes of its arguments are
        named as for `__call__`, and the result lies as the first of them."""
        return part

    def constrain(self, x: jax.Array, axes: str) -> jax.Array:
        """An activation, or the matrix that makes it, with its leading axes named by letters; `.` is never split.

        B is split with the batch, and N, K, F and V with the parameters that have them; b is a batch split no further
        than to the copies of the model, and d a width split as in parameters, for rows looked up where they lie. Where
        a size does not divide, the axis is whole everywhere.
        """
        return x

    def param_sharding(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
        """Where a parameter lies; see `spa_jax.weights.mapping.Shardings`."""
        return None

    def shard_batch(self, batch: Tree) -> Tree:
        """The global batch for a jitted program, of which this process brings its `rows` as NumPy arrays."""
        return batch

    def local_rows(self, count: int) -> Int[np.ndarray, " b"]:
        """Which of `count` rows of a batch this process has to load, in their order."""
        return np.arange(count)

    def to_local(self, batch: Tree) -> Tree:
        """`put` undone: this process's rows of a batch on the devices, as NumPy arrays."""
        return jax.device_get(batch)

    def constrain_params(self, tree: Tree) -> Tree:
        """Parameters, or a state that holds some, each where the table of parameters says."""
        return tree

    def gather(self, tree: Tree) -> Tree:
        """Parameters as a program uses them: small ones whole everywhere; a backbone fetches its own by the block."""
        return tree


SINGLE_DEVICE = Partitioner()
