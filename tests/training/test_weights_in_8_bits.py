"""Training on a backbone that is kept in 8 bits."""

import jax.numpy as jnp
import pytest

from spa_jax.decoding.encoders import prompt_encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.models.compute import Compute
from spa_jax.scoring.evaluation import EvaluationConfig, _identity
from spa_jax.training import run
from spa_jax.weights.registry import load_backbone

INT8 = {"compute.weights": "int8"}


@pytest.mark.parametrize("setting", ["spa", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_plugin_learns_as_on_floats(setting, make_config, tmp_path):
    losses = [
        run.train(make_config({"setting": setting, **keys}), tmp_path / name)
        for name, keys in (("float", {}), ("int8", INT8))
    ]
    assert losses[0]["loss/base"] != losses[1]["loss/base"]  # no tap cache of the other one was read
    assert losses[1]["loss/base"] == pytest.approx(losses[0]["loss/base"], rel=0.01)
    assert losses[1][f"loss/{setting}"] == pytest.approx(losses[0][f"loss/{setting}"], rel=0.05)
    assert losses[1][f"loss/{setting}"] < losses[1]["loss/base"]


def test_a_backbone_is_loaded_in_8_bits_with_the_fingerprint_of_its_file(tiny_backbone_directory):
    plain = load_backbone(str(tiny_backbone_directory))
    kept = load_backbone(str(tiny_backbone_directory), "bfloat16", compute=Compute(weights="int8"))
    assert kept.fingerprint == plain.fingerprint != kept.identity
    assert kept.dtype == jnp.bfloat16
    gate = kept.params["blocks"]["mlp"]["gate"]["kernel"]
    assert (gate.qvalue.dtype, gate.scale.dtype) == (jnp.int8, jnp.float32)
    assert gate.scale.shape == (gate.qvalue.shape[0], 1, gate.qvalue.shape[2])
    config = EvaluationConfig("sciq", "")
    encoder = prompt_encoder(plain, None)
    one, other = (_identity(config, encoder, FusedModel(each, None), None, []) for each in (plain, kept))
    assert one != other


def test_pruning_needs_floats(make_config):
    with pytest.raises(UserError, match=r"leave compute\.weights at 'float'"):
        make_config({**INT8, "side.kind": "transformer", "side.init": "pruned"})
