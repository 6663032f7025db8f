"""Faults against real processes: each ends as documented, and other sessions on the same cloud go on correctly."""

import asyncio

import pytest
from tiny_split import random_plugin

pytest.importorskip("trustme")

from experiments.benchmarks.fault_bench import FAULTS, NEW, FaultHarness, observe
from spa_jax.weights.registry import load_backbone

SEED = 5
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def harness(tiny_backbone_directory, tmp_path_factory):
    """A random plugin that is always asked, so that every token is an exchange, and each lost one another token."""
    folder = tmp_path_factory.mktemp("faults")
    backbone = load_backbone(str(tiny_backbone_directory))
    plugin = random_plugin(backbone, "s1", SEED)
    plugin.save(folder / "plugin")
    harness = FaultHarness(backbone, plugin, folder / "plugin", folder)
    assert harness.steps == NEW
    said = [harness.expected(frozenset(lost)) for lost in ([], [2], range(1, 99), range(3, 99))]
    assert len({tuple(tokens) for tokens in said}) == 4, "the judge could not tell a lost answer from a kept one"
    return harness


@pytest.fixture(scope="module")
def site(harness):
    with harness.cloud() as site:
        yield site


@pytest.mark.parametrize("name", [name for name in FAULTS if not FAULTS[name].alone])
def test_a_fault_ends_as_documented(name, site):
    seen = asyncio.run(observe(FAULTS[name], site))
    assert (seen["observed"], seen["wrong tokens of others"]) == (seen["documented"], 0)
    assert site.cloud.process.poll() is None


@pytest.mark.parametrize("name", [name for name in FAULTS if FAULTS[name].alone])
def test_a_fault_of_the_cloud_ends_as_documented(name, harness):
    with harness.cloud(FAULTS[name].expired) as site:
        seen = asyncio.run(observe(FAULTS[name], site))
    assert seen["observed"] == seen["documented"]
