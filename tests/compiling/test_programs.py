"""A config's programs compiled from shapes: their work against a count by hand, and what they hold."""

import json

import jax
import pytest

from spa_jax.compiling.programs import Sizes, compile_programs
from spa_jax.compiling.topology import find_target
from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig
from spa_jax.models.llama import init_params
from spa_jax.training.sharding import MeshConfig, MeshPartitioner, make_mesh
from spa_jax.weights.architectures import ARCHITECTURES, architecture

V, D, F, L, N, K, H = 512, 256, 1024, 6, 8, 4, 32
ROWS, LENGTH, TAPS, WIDTH = 4, 32, 3, 16
BLOCK = 2 * (D * (N + 2 * K) * H + N * H * D + 3 * D * F)
"""Operations of a block's products with weights, of one token."""


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A directory with nothing but a config.json."""
    path = tmp_path_factory.mktemp("shapes")
    config = {
        "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": N, "num_key_value_heads": K, "max_position_embeddings": 128, "eos_token_id": 2,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def compiled(described, make_config):
    keys = {"backbone": described, "side.taps": "0,3,6", "side.width": WIDTH, "tap_cache.enabled": False}
    partitioner = MeshPartitioner(make_mesh(MeshConfig(1, 1, 1, 1), 8, jax.devices()[:1]))

    def compile_one(which, **options):
        config = make_config(keys | options)
        return list(compile_programs(config, which, partitioner, Sizes(ROWS, LENGTH, LENGTH, 8), "float32"))

    return compile_one


@pytest.fixture(scope="module")
def step(compiled):
    (program,) = compiled("train")
    return program


def test_a_step_does_the_work_of_its_products(step):
    tokens = ROWS * LENGTH
    block = 2 * (D * (N + 2 * K) * H + N * H * D + 3 * D * F) + 2 * 2 * LENGTH * N * H
    heads = (1 + 2) * 2 * V * D  # the base's loss; the plugin's, and its gradient
    ladder = TAPS * D * WIDTH * 2 + (TAPS - 1) * 2 * 2 * D * WIDTH * 3 + 2 * D * WIDTH * 3 + TAPS * D * WIDTH * 2
    router = 2 * 2 * D * 2
    assert step.cost.flops == pytest.approx(tokens * (L * block + heads + ladder + router), rel=2e-3)


def test_a_step_holds_no_gradient_of_the_backbone(step, described):
    backbone = 4 * architecture(described).num_params
    assert step.argument_bytes > backbone
    assert step.temporary_bytes < 0.5 * backbone
    assert step.peak_bytes < 1.5 * backbone


def test_with_a_tap_cache_the_backbone_pass_is_a_program_of_its_own(compiled, step):
    backbone_pass, train = compiled("train", **{"tap_cache.enabled": True})
    assert (backbone_pass.name, train.name) == ("backbone pass", "train step")
    assert train.cost.flops < 0.2 * backbone_pass.cost.flops
    assert backbone_pass.cost.flops + train.cost.flops == pytest.approx(step.cost.flops, rel=2e-3)


@pytest.mark.parametrize("edits", ["targets", pytest.param("all", marks=pytest.mark.slow)])
def test_a_step_at_an_inner_entry_goes_through_the_upper_blocks_alone(edits, compiled, described):
    """Forward with the device's correction and without, and back twice as well; the rest is head and side network."""
    options = {"side.entry": "4", "side.edits": edits, "side.taps": "0,2,4", "tap_cache.enabled": True}
    backbone_pass, train = compiled("train", **options)
    block = 2 * (D * (N + 2 * K) * H + N * H * D + 3 * D * F)
    assert backbone_pass.cost.flops > ROWS * LENGTH * L * block
    upper = ROWS * LENGTH * (L - 4) * block
    assert 4 * upper < train.cost.flops < 5 * upper
    assert train.temporary_bytes < 4 * architecture(described).num_params


def test_generating_a_token_reads_the_backbone_once(compiled, described):
    part, step = compiled("cloud")
    kernels = init_params(architecture(described), abstract=True)
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves((kernels["blocks"], kernels["lm_head"])))
    assert size < step.cost.bytes < 5 * size  # a CPU copies a block's kernels out of the stack first
    assert step.cost.unknown_loops == 1
    assert part.name == f"{LENGTH} tokens of a prompt"
    assert part.cost.flops == pytest.approx(LENGTH * L * BLOCK, rel=0.05)
    assert step.cost.flops == pytest.approx(ROWS * (L * BLOCK + 2 * D * V), rel=0.05)


@pytest.mark.parametrize(
    ("entry", "edits"), [("2", "all"), pytest.param("0", "targets", marks=pytest.mark.slow)], ids=str
)
def test_a_new_token_costs_the_cloud_the_same_wherever_corrections_enter(entry, edits, compiled):
    """And a prompt goes through every block once, in one program or in two."""
    part, step = compiled("cloud")
    options = {"side.entry": entry, "side.edits": edits, "side.taps": "0"}
    *opening, inner = compiled("cloud", **options)
    assert len(opening) == 1 + (edits == "all")
    assert sum(program.cost.flops for program in opening) == pytest.approx(part.cost.flops, rel=0.02)
    assert inner.cost.flops == pytest.approx(step.cost.flops, rel=0.02)
    assert inner.cost.unknown_loops == 1


@pytest.mark.parametrize("kind", ["tokenwise", "transformer"])
def test_the_device_needs_no_backbone(compiled, kind, described):
    (correct,) = compiled("device", **{"side.kind": kind})
    assert correct.peak_bytes < 0.1 * 4 * architecture(described).num_params


def test_llama_has_the_published_number_of_parameters():
    published = {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192}
    published |= {"llama-3.1-8b": 8_030_261_248, "smollm2-135m-instruct": 134_515_008}
    assert {name: ARCHITECTURES[name].num_params for name in published} == published


def test_an_unknown_architecture_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no architecture 'llama-8c'.*llama-7b"):
        architecture("llama-8c")


def test_an_unknown_topology_is_named():
    with pytest.raises(UserError, match=r"no topology 'v9:2x2'.*v5e"):
        find_target("v9:2x2")


def test_smollm2_is_what_its_file_says(smollm2_without_weights):
    found = architecture("smollm2-135m-instruct")
    assert isinstance(found, LlamaConfig)
    assert found == smollm2_without_weights.config
