"""Generation with LoRA and Adapter, against rerunning the whole text and against a backbone with merged weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.models.block import PADDING
from spa_jax.models.llama import Llama
from spa_jax.models.peft import Peft, PeftConfig, init_peft
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import PeftPlugin

NEW = 10
PROMPTS = [np.random.default_rng(seed).integers(0, 96, length).tolist() for seed, length in enumerate((3, 11, 6))]
LORA, ADAPTER = PeftConfig("lora", 3, 6.0), PeftConfig("adapter", 3)


def make_plugin(config, backbone):
    rng = np.random.default_rng(1)
    shapes = init_peft(config, backbone.config, abstract=True)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.2 * rng.standard_normal(leaf.shape))), shapes)
    return PeftPlugin(config, params, "tiny", "f" * 32, "plain")


@pytest.fixture(scope="module")
def backbone(tiny_config, tiny_params):
    return Backbone("tiny", tiny_config, tiny_params, None, (), "f" * 32)


@pytest.mark.parametrize("config", [LORA, ADAPTER], ids=["lora", "adapter"])
def test_greedy_equals_rerunning_the_whole_text_and_stops_at_eos(config, backbone):
    plugin, width = make_plugin(config, backbone), 24
    model, frozen = Llama(backbone.config), backbone.params

    @jax.jit
    def logits(tokens, positions):
        out = model.apply({"params": frozen}, tokens, positions, peft=Peft(config, plugin.params))
        return model.apply({"params": frozen}, out.hidden[0], method="logits")

    expected = []
    for prompt in PROMPTS:
        text = list(prompt)
        while len(text) < len(prompt) + NEW:
            padding = width - len(text)
            positions = np.array([[*range(len(text)), *[PADDING] * padding]], np.int32)
            row = logits(np.array([[*text, *[0] * padding]], np.int32), positions)[len(text) - 1]
            assert np.diff(np.sort(row)[-2:]) > 1e-4, "float noise could decide this case: choose another seed"
            text.append(int(row.argmax()))
        expected.append(text[len(prompt) :])
    generations = FusedModel(backbone, plugin).generate(PROMPTS, NEW)
    assert [g.tokens for g in generations] == expected
    assert {g.consulted_share for g in generations} == {1.0}
    eos = expected[1][4]
    ending = FusedModel(dataclasses.replace(backbone, eos_ids=(eos,)), plugin)
    ends = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in expected]
    assert [g.tokens for g in ending.generate(PROMPTS, NEW)] == ends
    assert len(ends[1]) < NEW
    assert [token for token, _ in ending.stream(PROMPTS[1], NEW)] == ends[1]


@pytest.mark.slow
def test_a_beam_search_of_lora_equals_that_of_merged_weights(backbone):
    plugin, beams = make_plugin(LORA, backbone), Beams(3)
    merged = jax.tree.map(np.array, backbone.params)
    for name, factors in plugin.params.items():
        kernel = merged["blocks"]["attention"][name]["kernel"]
        kernel += 2 * np.einsum("lde,lew->ldw", factors["a"], factors["b"]).reshape(kernel.shape)
    judge = FusedModel(dataclasses.replace(backbone, params=merged, eos_ids=(7, 30)), None)
    found = FusedModel(dataclasses.replace(backbone, eos_ids=(7, 30)), plugin).generate(PROMPTS, NEW, beams=beams)
    expected = judge.generate(PROMPTS, NEW, beams=beams)
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    assert [g.consulted_share for g in found] == [1.0] * 3


def test_it_runs_as_itself_or_as_base_on_its_own_backbone(backbone):
    plugin = make_plugin(LORA, backbone)
    assert FusedModel(backbone, plugin).setting == "lora"
    assert FusedModel(backbone, plugin, "base").setting == "base"
    with pytest.raises(UserError, match="trained on the backbone 'tiny'"):
        FusedModel(backbone, dataclasses.replace(plugin, fingerprint="0" * 32))
    with pytest.raises(UserError, match="does not fit the backbone 'tiny'"):
        FusedModel(backbone, dataclasses.replace(plugin, config=PeftConfig("lora", 4, 6.0)))
