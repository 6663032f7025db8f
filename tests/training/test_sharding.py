"""The mesh's sizes, and the table of parameters: total, unambiguous, and an error where it cannot be followed."""

import dataclasses
import re

import flax.traverse_util
import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig
from spa_jax.models.llama import init_params
from spa_jax.models.peft import TARGETS, PeftConfig, init_peft
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.training.sharding import AXES, TABLE, MeshConfig, MeshPartitioner, make_mesh, mesh_shape, spec_of

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=8
)
KINDS = {"tokenwise": SideConfig("tokenwise", 8, (0, 2, 3)), "transformer": SideConfig("transformer", 8, (0, 2, 3))}


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), AXES)


def parameters():
    """Paths and shapes of all parameters there are: of every option of a backbone, and of all that is trained."""
    biased = dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True, qk_norm=True)
    for tree in (init_params(biased, abstract=True), init_params(CONFIG, abstract=True)):
        yield from flax.traverse_util.flatten_dict(tree, sep="/").items()
    for side in KINDS.values():
        plugin = init_plugin(PluginConfig("spa", side, 64, offset=True), abstract=True)
        plugin["folds"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), plugin["side"])
        yield from flax.traverse_util.flatten_dict(plugin, sep="/").items()
    for peft in (PeftConfig("lora", 4, targets=TARGETS), PeftConfig("adapter", 4)):
        yield from flax.traverse_util.flatten_dict(init_peft(peft, CONFIG, abstract=True), sep="/").items()


def test_every_parameter_has_one_rule_and_every_rule_a_parameter():
    rules = {path: [rule for rule in TABLE if re.fullmatch(rule, path)] for path, _ in parameters()}
    assert all(len(found) == 1 for found in rules.values()), rules
    assert {found[0] for found in rules.values()} == set(TABLE)


def test_every_large_parameter_of_the_backbone_is_split_over_fsdp_and_tensor():
    mesh = mesh_of(fsdp=4, tensor=2)
    for path, leaf in flax.traverse_util.flatten_dict(init_params(CONFIG, abstract=True), sep="/").items():
        if path.endswith(("kernel", "embedding")):
            assert {"fsdp", "tensor"} <= set(spec_of(path, leaf.shape, mesh)), path


def test_an_unknown_parameter_is_named():
    with pytest.raises(UserError, match=r"no rule .* 'blocks/attention/z/kernel'"):
        spec_of("blocks/attention/z/kernel", (3, 64, 8, 8), mesh_of())


def test_heads_that_do_not_divide_are_named_with_the_axis():
    with pytest.raises(UserError, match=r"axis 2 of the parameter 'blocks/attention/q/kernel'.* mesh\.tensor=3"):
        spec_of("blocks/attention/q/kernel", (3, 64, 8, 8), mesh_of(tensor=3))
    with pytest.raises(UserError, match=r"axis 1 of the parameter 'side/down'.* mesh\.fsdp=5"):
        spec_of("side/down", (3, 64, 8), mesh_of(fsdp=5))


@pytest.mark.parametrize(("tensor", "axis"), [(1, "tensor"), (2, "tensor"), (4, None), (8, None)])
def test_key_value_heads_are_copied_where_they_are_fewer_than_tensor(tensor, axis):
    assert spec_of("blocks/attention/k/kernel", (3, 64, 2, 8), mesh_of(tensor=tensor))[2] == axis


def test_an_odd_vocabulary_is_copied_and_still_split_by_width():
    assert tuple(spec_of("embed/embedding", (97, 64), mesh_of(fsdp=4, tensor=2))) == (None, "fsdp")
    assert tuple(spec_of("lm_head/kernel", (64, 97), mesh_of(fsdp=4, tensor=2))) == ("fsdp", None)
    with pytest.raises(UserError, match=r"mesh\.fsdp=5"):
        spec_of("embed/embedding", (97, 64), mesh_of(fsdp=5))


def test_six_key_value_heads_do_not_divide_by_four():
    with pytest.raises(UserError, match="axis 2 of the parameter 'blocks/attention/v/kernel'"):
        spec_of("blocks/attention/v/kernel", (3, 64, 6, 8), mesh_of(tensor=4))


@pytest.mark.parametrize(
    ("config", "devices", "slices", "shape"),
    [
        (MeshConfig(-1, -1, -1, -1), 1, 1, (1, 1, 1)),
        (MeshConfig(-1, -1, -1, -1), 8, 1, (1, 8, 1)),
        (MeshConfig(-1, -1, -1, -1), 16, 1, (1, 8, 2)),
        (MeshConfig(-1, -1, -1, -1), 64, 2, (2, 4, 8)),
        (MeshConfig(-1, -1, -1, -1), 6, 1, (1, 2, 3)),
        (MeshConfig(-1, -1, 1, -1), 16, 2, (2, 8, 1)),
        (MeshConfig(-1, 1, -1, -1), 8, 2, (2, 1, 4)),
        (MeshConfig(-1, 1, 1, -1), 8, 1, (8, 1, 1)),
        (MeshConfig(-1, 2, 2, -1), 8, 1, (2, 2, 2)),
        (MeshConfig(4, -1, 2, -1), 16, 2, (4, 2, 2)),
        (MeshConfig(4, -1, -1, -1), 16, 2, (4, 2, 2)),
    ],
)
def test_open_sizes_for_eight_rows(config, devices, slices, shape):
    assert mesh_shape(config, devices, slices, rows=8) == shape


@pytest.mark.parametrize("config", [MeshConfig(3, -1, 1, 1), MeshConfig(2, 2, 1, 1), MeshConfig(1, -1, 16, 1)])
def test_sizes_that_do_not_fit_are_named(config):
    with pytest.raises(UserError, match=rf"mesh\.data={config.data}, .* do not fit 8 devices"):
        mesh_shape(config, 8, 1, rows=8)


def test_a_copy_of_the_backbone_does_not_reach_over_slices():
    with pytest.raises(UserError, match=r"mesh\.data a multiple of the slices"):
        mesh_shape(MeshConfig(1, -1, 1, -1), 16, 2, rows=8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device that `make_mesh` reads."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_data_is_the_axis_between_slices():
    chips = [Chip(id=i, slice_index=i % 2) for i in range(8)]
    grid = make_mesh(MeshConfig(-1, 2, 2, -1), 8, chips).devices
    assert grid.shape == (2, 2, 2)
    for slice_index in range(2):
        assert {chip.slice_index for chip in grid[slice_index].ravel()} == {slice_index}


def test_slices_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"mesh\.slices=2, but the devices form 1 slices"):
        make_mesh(MeshConfig(-1, -1, 1, 2), 8, [Chip(id=i, slice_index=0) for i in range(8)])


def test_processes_stand_for_slices_where_the_hardware_names_none():
    chips = [Chip(id=i, slice_index=0, process_index=i // 4) for i in range(8)]
    grid = make_mesh(MeshConfig(-1, -1, 1, 2), 8, chips).devices
    assert [{chip.process_index for chip in part.ravel()} for part in grid] == [{0}, {1}]


def test_a_batch_that_does_not_divide_is_refused_with_what_would():
    chips = [Chip(id=i, slice_index=0) for i in range(8)]
    partitioner = MeshPartitioner(make_mesh(MeshConfig(2, 4, 1, 1), 16, chips))
    partitioner.check_batch(16, 2)
    with pytest.raises(UserError, match=r"train\.batch_size=8 .* multiple of 16"):
        partitioner.check_batch(8, 2)


def test_what_belongs_to_no_parameter_is_everywhere():
    partitioner = MeshPartitioner(make_mesh(MeshConfig(1, 1, 1, 1), 8, jax.devices()[:1]))
    shardings = partitioner.param_shardings({"side": {"gate": jax.ShapeDtypeStruct((2,), float)}} | {})
    assert shardings["side"]["gate"].spec == PartitionSpec(None)
    assert partitioner.param_shardings((jax.ShapeDtypeStruct((), int),))[0].spec == PartitionSpec()
    with pytest.raises(UserError, match="no rule"):
        partitioner.param_shardings((jax.ShapeDtypeStruct((3,), int),))
