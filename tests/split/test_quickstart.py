"""A plugin trained on the embedded default, on the real SmolLM2: two programs say what one says."""

import pytest

from configs import quickstart
from spa_jax.data.encoding import Encoder
from spa_jax.data.persona import generate as persona
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.split.generation import generate, open_message
from spa_jax.split.session import Cloud
from spa_jax.training.config import parse
from spa_jax.training.run import train
from spa_jax.weights.plugin import load_plugin

NEW = 24


@pytest.fixture(scope="module")
def plugin(smollm2, tmp_path_factory):
    """One epoch on two phrasings of each fact: enough that the router is of two minds and g says something."""
    config = quickstart.get_config()
    config.data.phrasings, config.train.epochs, config.router.budget = 2, 1, 0.6
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    config.tap_cache.directory = str(workdir.parent / "taps")
    summary = train(parse(config.to_dict()), workdir)
    assert summary["loss/spa"] < summary["loss/base"] - 0.5
    return load_plugin(workdir / "plugin")


@pytest.mark.slow
@pytest.mark.parametrize("beams", [None, Beams(3)], ids=["greedy", "beam 3"])
def test_two_programs_say_what_one_says(beams, plugin, smollm2):
    encoder = Encoder(smollm2.tokenizer, plugin.template, smollm2.config.max_position_embeddings)
    _, held_out = persona(0)
    prompts = [encoder.prompt(pair.source) for pair in held_out[::40]]
    one = FusedModel(smollm2, plugin).generate(prompts, NEW, beams=beams)
    two = generate(Cloud(smollm2), plugin, open_message(plugin, prompts, NEW, beams=beams))
    assert [g.tokens for g in two.generations] == [g.tokens for g in one]
    assert [g.consulted for g in two.generations] == [g.consulted for g in one]
    asked = [asked for generation in one for asked in generation.consulted]
    assert 0 < sum(asked) < len(asked)
    assert two.degraded == 0
