"""LoRA and Adapter over a channel, against the backbone with the same adapters written into it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.fused import FusedModel
from spa_jax.models.llama import MLP, Attention, by_position, rms_norm, rope_frequencies
from spa_jax.split.channel import InProcess
from spa_jax.split.layerwise import LayerwiseCloud, LayerwiseConfig, LayerwiseDevice, init_adapters
from spa_jax.split.wire import WireError
from spa_jax.weights.backbone import Backbone

PROMPT, NEW, RANK = [5, 17, 60, 3, 88], 8, 3


@pytest.fixture(scope="module")
def backbone(tiny_config, tiny_params):
    return Backbone("tiny", tiny_config, tiny_params, None, (), "f" * 32)


def run(backbone, method, codec="float32"):
    config = LayerwiseConfig(method, RANK, backbone.config)
    adapters = init_adapters(config, seed=1)
    channel = InProcess(LayerwiseDevice(config, adapters, codec).answer)
    tokens, traffic = LayerwiseCloud(backbone, config, codec, channel).generate(PROMPT, NEW)
    return tokens, traffic, adapters


def test_lora_says_what_the_backbone_with_merged_weights_says(backbone):
    tokens, traffic, adapters = run(backbone, "lora")
    merged = jax.tree.map(np.array, backbone.params)
    for name in ("q", "v"):
        kernel = merged["blocks"]["attention"][name]["kernel"]
        kernel += np.einsum("lde,lew->ldw", adapters[name]["a"], adapters[name]["b"]).reshape(kernel.shape)
    (judge,) = FusedModel(dataclasses.replace(backbone, params=merged), None).generate([PROMPT], NEW)
    assert tokens == judge.tokens
    assert tokens != FusedModel(backbone, None).generate([PROMPT], NEW)[0].tokens
    assert traffic.exchanges == (NEW - 1) * backbone.config.num_layers


def test_adapters_follow_both_halves_of_every_block(backbone):
    tokens, traffic, adapters = run(backbone, "adapter")
    c, blocks = backbone.config, backbone.params["blocks"]

    def adapted(name, layer, x):
        return x + jax.nn.relu(x @ adapters[name]["a"][layer]) @ adapters[name]["b"][layer]

    @jax.jit
    def logits(text):
        """Of the last position, nothing cached."""
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        angles = positions.astype(jnp.float32)[:, :, None] * rope_frequencies(c)[None, None, :]
        places = by_position(positions, None)
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


@pytest.mark.parametrize(("method", "up"), [("lora", 32 + 16), ("adapter", 32)])
def test_bytes_are_those_of_the_layers_inputs_and_of_what_is_added(method, up, backbone):
    _, small, _ = run(backbone, method, "bfloat16")
    _, large, _ = run(backbone, method, "float32")
    down, up_too = large.bytes_down - small.bytes_down, large.bytes_up - small.bytes_up
    envelope = 4 * large.exchanges  # lengths are written in as few bytes as they need
    assert 0 <= down - 2 * 32 * large.exchanges <= envelope
    assert 0 <= up_too - 2 * up * large.exchanges <= envelope


def test_an_adapter_that_is_not_there_is_refused(backbone):
    config = LayerwiseConfig("lora", RANK, backbone.config)
    device = LayerwiseDevice(config, init_adapters(config), "float32")
    from spa_jax.split.messages_pb2 import Layer

    with pytest.raises(WireError, match="no adapter 1 in layer 0"):
        device.answer(Layer(layer=0, place=1, count=1).SerializeToString())
    with pytest.raises(WireError, match="bytes"):
        device.answer(Layer(layer=0, place=0, count=1).SerializeToString())
