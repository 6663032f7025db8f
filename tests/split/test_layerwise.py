"""LoRA and Adapter over a channel, against the backbone with the same adapters written into it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.models.block import (
    MLP,
    Attention,
    place_by_position,
    rms_norm,
    rope_frequencies,
)
from spa_jax.models.peft import Peft, PeftConfig, init_peft
from spa_jax.split.channel import InProcess
from spa_jax.split.layerwise import LayerwiseCloud, LayerwiseDevice
from spa_jax.split.wire import WireError
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import PeftPlugin

PROMPT, NEW = [5, 17, 60, 3, 88], 8
LORA, ADAPTER = PeftConfig("lora", 3, 6.0), PeftConfig("adapter", 3)


@pytest.fixture(scope="module")
def backbone(tiny_config, tiny_params):
    return Backbone("tiny", tiny_config, tiny_params, None, (), "f" * 32)


def random_peft(config, backbone):
    """With random numbers in place of zeros, so that it says something."""
    rng = np.random.default_rng(1)
    shapes = init_peft(config, backbone, abstract=True)
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.2 * rng.standard_normal(leaf.shape))), shapes)


def run(backbone, config, codec="float32"):
    params = random_peft(config, backbone.config)
    channel = InProcess(LayerwiseDevice(Peft(config, params), backbone.config, codec).answer)
    tokens, traffic = LayerwiseCloud(backbone, config, codec, channel).generate(PROMPT, NEW)
    return tokens, traffic, params


@pytest.mark.parametrize("config", [LORA, dataclasses.replace(LORA, targets=("v", "k", "q")), ADAPTER])
def test_two_programs_say_what_one_says(config, backbone):
    tokens, _, params = run(backbone, config)
    (judge,) = FusedModel(backbone, PeftPlugin(config, params, "tiny", "f" * 32, "plain")).generate([PROMPT], NEW)
    assert tokens == judge.tokens


def test_lora_says_what_the_backbone_with_merged_weights_says(backbone):
    tokens, traffic, adapters = run(backbone, LORA)
    merged = jax.tree.map(np.array, backbone.params)
    for name in ("q", "v"):
        kernel = merged["blocks"]["attention"][name]["kernel"]
        kernel += 2 * np.einsum("lde,lew->ldw", adapters[name]["a"], adapters[name]["b"]).reshape(kernel.shape)
    (judge,) = FusedModel(dataclasses.replace(backbone, params=merged), None).generate([PROMPT], NEW)
    assert tokens == judge.tokens
    assert tokens != FusedModel(backbone, None).generate([PROMPT], NEW)[0].tokens
    assert traffic.exchanges == (NEW - 1) * backbone.config.num_layers
    assert traffic.opening_exchanges == backbone.config.num_layers
    assert traffic.prefill_bytes > len(PROMPT) * 4 * backbone.config.hidden_size * backbone.config.num_layers


def test_adapters_follow_both_halves_of_every_block(backbone):
    tokens, traffic, adapters = run(backbone, ADAPTER)
    c, blocks = backbone.config, backbone.params["blocks"]

    def adapted(name, layer, x):
        a, b, a_bias, b_bias = (adapters[name][key][layer] for key in ("a", "b", "a_bias", "b_bias"))
        return x + jnp.maximum(x @ a + a_bias[None, None], 0) @ b + b_bias[None, None]

    @jax.jit
    def logits(text):
        """Logits of every position, without a cache."""
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        angles = positions.astype(jnp.float32)[:, :, None] * rope_frequencies(c)[None, None, :]
        places = place_by_position(positions, None)
        h = backbone.params["embed"]["embedding"][text]
        for layer in range(c.num_layers):
            p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
            x = rms_norm(h, p["attention_norm"]["scale"], c.rms_norm_eps)
            mixed, _ = Attention(c, jnp.float32).apply({"params": p["attention"]}, x, angles, places, None, layer)
            h = h + adapted("attention", layer, mixed)
            x = rms_norm(h, p["mlp_norm"]["scale"], c.rms_norm_eps)
            h = h + adapted("mlp", layer, MLP(c, jnp.float32).apply({"params": p["mlp"]}, x))
        f = rms_norm(h, backbone.params["norm"]["scale"], c.rms_norm_eps)
        return f @ backbone.params["lm_head"]["kernel"]

    text = [*PROMPT, *tokens]
    padded = np.array([text], np.int32)
    scores = np.asarray(logits(padded))[0]
    assert tokens == scores[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist()
    assert tokens != FusedModel(backbone, None).generate([PROMPT], NEW)[0].tokens
    assert traffic.exchanges == 2 * (NEW - 1) * c.num_layers


@pytest.mark.parametrize(("config", "up"), [(LORA, 32 + 16), (ADAPTER, 32)])
def test_bytes_are_those_of_the_layers_inputs_and_of_what_is_added(config, up, backbone):
    _, small, _ = run(backbone, config, "bfloat16")
    _, large, _ = run(backbone, config, "float32")
    down, up_too = large.bytes_down - small.bytes_down, large.bytes_up - small.bytes_up
    envelope = 4 * large.exchanges  # lengths are written in as few bytes as they need
    assert 0 <= down - 2 * 32 * large.exchanges <= envelope
    assert 0 <= up_too - 2 * up * large.exchanges <= envelope


def test_an_adapter_that_is_not_there_is_refused(backbone):
    peft = Peft(LORA, random_peft(LORA, backbone.config))
    device = LayerwiseDevice(peft, backbone.config, "float32")
    from spa_jax.split.messages_pb2 import Layer

    with pytest.raises(WireError, match="no adapter 1 in layer 0"):
        device.answer(Layer(layer=0, place=1, count=1).SerializeToString())
    with pytest.raises(WireError, match="bytes"):
        device.answer(Layer(layer=0, place=0, count=1).SerializeToString())


def test_a_lora_on_more_than_the_attentions_input_is_refused(backbone):
    config = dataclasses.replace(LORA, targets=("q", "down", "o"))
    with pytest.raises(UserError, match="works on q, k and v, not on down, o"):
        run(backbone, config)
