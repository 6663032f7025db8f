"""Cloud and device on two hosts with a real network between them, against equation 6."""

import pytest
from tiny_split import random_plugin

from experiments.benchmarks.hosts import Link
from experiments.benchmarks.over_link import over_link
from spa_jax.errors import UserError
from spa_jax.weights.registry import load_backbone

pytestmark = pytest.mark.slow
NEW = 8


@pytest.fixture
def over(tiny_backbone_directory, tmp_path):
    backbone = load_backbone(str(tiny_backbone_directory))
    random_plugin(backbone, "s1").save(tmp_path / "plugin")

    def run(link):
        try:
            (row,) = over_link(link, backbone.name, tmp_path / "plugin", ["What is thing 1?"], NEW)
        except UserError as error:
            if "not permitted here" in str(error):
                pytest.skip(str(error))
            raise
        return row

    return run


def test_exchanges_take_what_the_network_takes(over):
    """No less than equation 6, and not much more: where the delay is long, all else is short."""
    near, far = over(Link(0.01)), over(Link(0.1))
    assert near["tokens"] == far["tokens"]
    for row in (near, far):
        assert (row["exchanges"], row["degraded"]) == (NEW, 0)
        assert row["measured_seconds"] > 0.98 * row["predicted_seconds"]
    assert far["measured_seconds"] < 2 * far["predicted_seconds"]
    between = far["measured_seconds"] - near["measured_seconds"]
    assert between == pytest.approx(far["predicted_seconds"] - near["predicted_seconds"], rel=0.5)


def test_lost_packets_cost_time_and_nothing_else(over):
    whole, lossy = over(Link(0.01)), over(Link(0.01, loss=0.05))
    assert lossy["tokens"] == whole["tokens"]
    assert (lossy["exchanges"], lossy["degraded"]) == (NEW, 0)
