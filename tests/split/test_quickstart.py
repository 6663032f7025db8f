"""A plugin trained on the embedded default, on the real SmolLM2: two programs say what one says."""

import asyncio

import pytest

from configs import quickstart
from spa_jax.data.encoding import Encoder
from spa_jax.data.persona import generate as persona
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.split.client import generate as over_grpc
from spa_jax.split.generation import generate as in_process
from spa_jax.split.head import head_of
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.training.config import parse
from spa_jax.training.run import train
from spa_jax.weights.plugin import load_plugin

pytestmark = pytest.mark.usefixtures("optimised")  # so large a model is worth it
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


def _prompts(plugin, smollm2):
    encoder = Encoder(smollm2.tokenizer, plugin.template, smollm2.config.max_position_embeddings)
    _, held_out = persona(0)
    return [encoder.prompt(pair.source) for pair in held_out[::40]]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [None, Beams(3)], ids=["greedy", "beam 3"])
def test_two_programs_say_what_one_says(beams, plugin, smollm2):
    prompts = _prompts(plugin, smollm2)
    one = FusedModel(smollm2, plugin).generate(prompts, NEW, beams=beams)
    two = in_process(Cloud(smollm2), plugin, open_message(plugin, prompts, NEW, beams=beams))
    assert [g.tokens for g in two.generations] == [g.tokens for g in one]
    assert [g.consulted for g in two.generations] == [g.consulted for g in one]
    asked = [asked for generation in one for asked in generation.consulted]
    assert 0 < sum(asked) < len(asked)
    assert two.degraded == 0


@pytest.mark.slow
def test_two_processes_over_tls_say_what_one_says(plugin, smollm2, tmp_path):
    faults = pytest.importorskip("experiments.benchmarks.fault_bench")
    plugin.save(tmp_path / "plugin")
    with faults.FaultHarness(smollm2, plugin, tmp_path / "plugin", tmp_path).cloud() as site:
        for how in ({}, {"beams": Beams(3)}, {"reply": "token"}):
            request = open_message(plugin, _prompts(plugin, smollm2), NEW, **how)
            request_here = open_message(plugin, _prompts(plugin, smollm2), NEW, beams=how.get("beams"))
            here = in_process(Cloud(smollm2), plugin, request_here)
            there = asyncio.run(over_grpc(site.connection, plugin, request, head=head_of(smollm2)))
            assert [g.tokens for g in there.generations] == [g.tokens for g in here.generations], how
            assert [g.consulted for g in there.generations] == [g.consulted for g in here.generations], how
            assert there.degraded == 0
