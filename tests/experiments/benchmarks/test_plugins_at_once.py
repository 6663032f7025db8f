"""Sessions of many plugins at a cloud of its own, at the smallest size."""

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import plugins_at_once
from experiments.benchmarks.timing import make_plugin
from spa_jax.split.cloud_process import cloud_process
from spa_jax.weights.registry import load_backbone


@pytest.mark.slow
def test_every_plugin_has_a_session(tiny_backbone_directory):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    backbone = load_backbone(str(tiny_backbone_directory))
    plugin = make_plugin(backbone, 1, "all")
    with flagsaver.flagsaver(plugins=8, block=4, at_once=2), cloud_process(backbone.name) as cloud:
        found = plugins_at_once.measure(plugin, cloud, backbone.config.vocab_size)
    assert [row["sessions"] for row in found.values()] == [8, 8]
    assert all(row["tokens_per_second"] > 0 for row in found.values())
