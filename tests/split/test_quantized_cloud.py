"""A cloud whose backbone is kept in 8 bits says what the same backbone says in one program."""

import dataclasses

import jax
import pytest
from tiny_split import make_plugin

from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.models.compute import Compute
from spa_jax.models.peft import PeftConfig
from spa_jax.models.quantized import quantize
from spa_jax.split.channel import InProcess
from spa_jax.split.generation import generate
from spa_jax.split.head import head_of
from spa_jax.split.layerwise import LayerwiseCloud
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud

PROMPTS = [[3, 7, 11, 2], [90, 14, 33, 8, 21, 60], [1, 2]]


@pytest.fixture(scope="module")
def in_8_bits(backbone):
    params = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: quantize("/".join(key.key for key in keys), leaf), backbone.params
    )
    return dataclasses.replace(backbone, params=params, compute=Compute(weights="int8"))


def test_two_programs_say_what_one_does(in_8_bits):
    plugin = make_plugin("spa")
    request = open_message(plugin, PROMPTS, 8, "float32")
    split = generate(Cloud(in_8_bits), plugin, request, InProcess).generations
    fused = FusedModel(in_8_bits, plugin).generate(PROMPTS, 8)
    assert [(g.tokens, g.consulted) for g in split] == [(g.tokens, g.consulted) for g in fused]
    assert any(any(g.consulted) for g in fused)


def test_what_reads_floats_is_refused(in_8_bits):
    with pytest.raises(UserError, match="a copy of the LM head needs a backbone whose weights are floats"):
        head_of(in_8_bits, "int8")
    with pytest.raises(UserError, match="LoRA or Adapter on a device needs"):
        LayerwiseCloud(in_8_bits, PeftConfig("lora", 4), "float32", InProcess(lambda _: None))
