"""One model on any mesh: which device holds which part of it.

A mesh has three axes. `data` holds copies of everything; `fsdp` splits both the batch and the parameters, so that a
device fetches a block's weights when it needs them (Zhao et al. 2023); `tensor` splits heads, feed-forward features and
vocabulary (Shoeybi et al. 2019). One table says where a parameter is split; there is no default, so a parameter that it
does not know is an error. Shape letters: L blocks, D width, N query heads, K key/value heads, H head width, F
feed-forward width, V vocabulary; P taps, E side width.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from spa_jax.errors import UserError
from spa_jax.models.partitioner import Partitioner

Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The mesh axes that split a batch."""

LETTERS: dict[str, Any] = {
    "B": BATCH_AXES, "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor", "b": "data", "d": "fsdp"
}  # fmt: skip
"""Letter of an activation's axis -> the mesh axes that split it, see `Partitioner.constrain`."""

P = PartitionSpec
BACKBONE = {
    r"embed/embedding": P("tensor", "fsdp"),  # V,D
    r"blocks/(attention|mlp)_norm/scale": P(None, None),  # L,D
    r"blocks/attention/[qkv]/kernel": P(None, "fsdp", "tensor", None),  # L,D,N,H
    r"blocks/attention/[qk]_norm/scale": P(None, None),  # L,H
    r"blocks/attention/[qkv]/bias": P(None, "tensor", None),  # L,N,H
    r"blocks/attention/o/kernel": P(None, "tensor", None, "fsdp"),  # L,N,H,D
    r"blocks/attention/o/bias": P(None, None),  # L,D
    r"blocks/mlp/(gate|up)/kernel": P(None, "fsdp", "tensor"),  # L,D,F
    r"blocks/mlp/(gate|up)/bias": P(None, "tensor"),  # L,F
    r"blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),  # L,F,D
    r"blocks/mlp/down/bias": P(None, None),  # L,D
    r"norm/scale": P(None),  # D
    r"lm_head/kernel": P("fsdp", "tensor"),  # D,V
}
SIDE = {
    r"down": P(None, "fsdp", None),  # P,D,E
    r"output": P(None, "fsdp"),  # E,D
    r"gate": P(None),
    r"adapter_in": P(None, None, "fsdp"),  # P,E,D
    r"adapter_in_bias": P(None, "fsdp"),  # P,D
    r"adapter_out": P(None, "fsdp", None),  # P,D,E
    r"adapter_out_bias": P(None, None),  # P,E
    r"norm/scale": P(None),  # E
    r"ladder/gate": P(None),
    r"ladder/block/(attention|mlp)_norm/scale": P(None, None),  # P,E
    r"ladder/block/attention/[qkvo]/kernel": P(None, None, None, None),  # P,E,N,H
    r"ladder/block/mlp/(gate|up|down)/kernel": P(None, None, None),  # P,E,F
}
"""Split by D in a training state, as their optimizer state is; programs gather them whole, see `Partitioner.gather`."""
TABLE = {
    **BACKBONE,
    r"(attention|mlp|[qkvo]|gate|up|down)/a": P(None, "fsdp", None),  # L,I,E
    r"(attention|mlp|[qkvo]|gate|up|down)/b": P(None, None, "fsdp"),  # L,E,O
    r"(attention|mlp)/[ab]_bias": P(None, None),  # L,E and L,D
    **{f"side/{name}": spec for name, spec in SIDE.items()},
    **{f"folds/{name}": P(None, *spec) for name, spec in SIDE.items()},
    r"router/kernel": P(None, None),  # D,2
    r"router/offset": P(None),  # D
}
"""Parameter path -> where each of its axes is split."""

REPLICATED_IF_FEWER = re.compile(r"blocks/attention/[kv]/(kernel|bias)")
"""Parameters whose axes of a size less than `tensor` are not split: grouped-query attention has few key/value heads."""

REPLICATED_IF_UNEVEN = re.compile(r"embed/embedding|lm_head/kernel")
"""Parameters whose vocabulary is not split where it does not divide: a single added token would forbid every mesh."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis, the config keys `mesh.*`; -1 leaves it open.

    By default every slice holds one copy of the backbone, split over all of its devices: by `fsdp` as far as the batch
    has rows for, and by `tensor` beyond. With a small backbone, `fsdp=1` and `tensor=1` save fetching its weights: then
    `data` takes all devices.

    Attributes:
        data: copies of the backbone, those of all slices together.
        fsdp: parts of a copy; the batch is split into data * fsdp parts.
        tensor: parts of each head, feed-forward and vocabulary axis; it exchanges activations in every block, so it
            belongs within fast links.
        slices: groups of devices with fast links within and slow ones between; only `data` reaches over them. Open, it
            is what the hardware says.
    """

    data: int = -1
    fsdp: int = -1
    tensor: int = -1
    slices: int = -1


def mesh_shape(config: MeshConfig, devices: int, slices: int, rows: int) -> tuple[int, int, int]:
    """Decides the number of devices along data, fsdp and tensor, for a batch of so many rows.

    Raises:
        UserError: they do not multiply to the devices there are.
    """
    wanted = {axis: getattr(config, axis) for axis in AXES}
    shape = {axis: size for axis, size in wanted.items() if size != -1}
    if len(shape) < 2:
        shape.setdefault("data", slices)
    left = devices // math.prod(shape.values())
    if len(shape) < 2:
        shape["fsdp"] = math.gcd(left, rows // shape["data"])
        left //= shape["fsdp"]
    shape |= {axis: left for axis in AXES if axis not in shape}
    if math.prod(shape.values()) != devices or shape["data"] % slices:
        sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in wanted.items())
        raise UserError(
            f"{sizes} do not fit {devices} devices in {slices} slices: their product must be {devices}, and mesh.data "
            "a multiple of the slices"
        )
    return shape["data"], shape["fsdp"], shape["tensor"]


def make_mesh(config: MeshConfig, rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh for batches of so many rows over these devices, by default all devices of all processes.

    Raises:
        UserError: the devices do not make up such a mesh.
    """
    devices = jax.devices() if devices is None else devices
    found = len({getattr(device, "slice_index", 0) for device in devices})
    slices = found if config.slices == -1 else config.slices
    data, fsdp, tensor = mesh_shape(config, len(devices), slices, rows)
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True), AXES)
    processes = len({device.process_index for device in devices})
    if slices not in (found, processes):
        raise UserError(
            f"mesh.slices={slices}, but the devices form {found} slices, and {processes} processes hold them: leave it "
            "open with mesh.slices=-1"
        )
    inner, outer = (data // slices, fsdp, tensor), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=slices != found, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES)


def spec_of(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Looks up which mesh axes split a parameter.

    Args:
        path: slash-separated path of the parameter.
        shape: shape of the whole parameter.
        mesh: the mesh that it is split over.

    Raises:
        UserError: the table does not know the parameter, or one of its axes does not divide.
    """
    spec = next((spec for pattern, spec in TABLE.items() if re.fullmatch(pattern, path)), None)
    if spec is None:
        raise UserError(f"no rule of spa_jax.training.sharding says where the parameter '{path}' is split: add one")
    if len(spec) != len(shape):
        raise UserError(f"the rule for the parameter '{path}' has {len(spec)} axes, and the parameter {list(shape)}")
    parts = []
    for index, (axis, size) in enumerate(zip(spec, shape)):
        axis = axis if size > 1 else None  # as where a scale is the same for all
        count = mesh.shape[axis] if axis else 1
        if size % count:
            fewer = size < count and REPLICATED_IF_FEWER.fullmatch(path)
            if fewer or (axis == "tensor" and REPLICATED_IF_UNEVEN.fullmatch(path)):
                axis = None
            else:
                raise UserError(
                    f"axis {index} of the parameter '{path}' {list(shape)} does not divide by mesh.{axis}={count}: "
                    f"choose a mesh.{axis} that divides {size}"
                )
        parts.append(axis)
    return P(*parts)


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))


@dataclasses.dataclass(frozen=True)
class MeshPartitioner(Partitioner):
    """Splits arrays over a mesh. On a mesh of one device it constrains nothing, as `Partitioner`."""

    mesh: Mesh

    @property
    def batch_parts(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def axis_size(self, letter: str) -> int:
        axis = LETTERS.get(letter)
        return self.batch_parts if axis == BATCH_AXES else self.mesh.shape[axis] if axis else 1

    def spec(self, x: jax.Array | jax.ShapeDtypeStruct, axes: str) -> PartitionSpec:
        """Returns which mesh axes split an array whose axes are named as for `constrain`."""
        divides = (size % self.axis_size(letter) == 0 for letter, size in zip(axes, x.shape))
        return P(*(LETTERS.get(letter) if whole else None for letter, whole in zip(axes, divides)))

    def shard_map(self, part: Callable[..., jax.Array], arguments: Sequence[str]) -> Callable[..., jax.Array]:
        if self.mesh.size == 1:
            return part

        def call(*xs: jax.Array) -> jax.Array:
            specs = tuple(self.spec(x, axes) for x, axes in zip(xs, arguments, strict=True))
            return jax.shard_map(part, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*xs)

        return call

    def constrain(self, x: jax.Array, axes: str) -> jax.Array:
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(x, axes)))

    def constrain_params(self, tree: Tree) -> Tree:
        return tree if self.mesh.size == 1 else jax.lax.with_sharding_constraint(tree, self.param_shardings(tree))

    def gather(self, tree: Tree) -> Tree:
        if self.mesh.size == 1:
            return tree

        def fetched(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            return leaf if any(re.fullmatch(rule, _path(keys)) for rule in BACKBONE) else self.constrain(leaf, "")

        return jax.tree_util.tree_map_with_path(fetched, tree)

    def param_shardings(self, tree: Any) -> Any:
        """Returns the sharding of every leaf of parameters or of a training state.

        Statistics of a parameter, such as its averages in an optimizer, are split as it is; a number that belongs to no
        parameter, such as a step, is replicated.

        Raises:
            UserError: the table does not know a parameter, or one of its axes does not divide.
        """

        def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
            path = _path(keys)
            spec = P() if not path and not leaf.shape else spec_of(path, leaf.shape, self.mesh)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def param_sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        return None if self.mesh.size == 1 else NamedSharding(self.mesh, spec_of(path, shape, self.mesh))

    def place(self, tree: Tree) -> Tree:
        """Puts a tree of whole arrays, the same in every process, on the devices as `param_shardings` says."""
        return tree if self.mesh.size == 1 else jax.tree.map(self._scatter, tree, self.param_shardings(tree))

    def _scatter(self, array: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(array)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def to_host(self, tree: Tree) -> Tree:
        """Copies parameters on the devices to the host memory of every process, whole."""
        if jax.process_count() > 1:
            tree = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))(tree)
        return jax.device_get(tree)

    def local_rows(self, count: int) -> Int[np.ndarray, " b"]:
        indices = self.batch_sharding.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[index] for index in indices]))

    def shard_batch(self, batch: Tree) -> Tree:
        if self.mesh.size == 1:
            return batch
        share = self.batch_parts // len(self.local_rows(self.batch_parts))

        def whole(leaf: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(
                self.batch_sharding, leaf, (leaf.shape[0] * share, *leaf.shape[1:])
            )

        return jax.tree.map(whole, batch)

    def to_local(self, batch: Tree) -> Tree:

        def rows(leaf: jax.Array) -> np.ndarray:
            parts = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
            return np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])

        return jax.device_get(batch) if jax.process_count() == 1 else jax.tree.map(rows, batch)

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Refuses a batch that cannot be split.

        Raises:
            UserError: with the numbers.
        """
        if batch_size % (accumulate * self.batch_parts):
            raise UserError(
                f"train.batch_size={batch_size} in train.accumulate={accumulate} parts does not divide by mesh.data * "
                f"mesh.fsdp = {self.batch_parts}: make it a multiple of {accumulate * self.batch_parts}, or "
                "mesh.tensor larger"
            )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of every leaf of a batch: its first axis is split."""
        return NamedSharding(self.mesh, P(BATCH_AXES))
