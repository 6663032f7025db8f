"""Equations 4 to 6 against numbers worked out by hand, and the fit against exchanges made up to fit."""

import jax
import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.split.channel import Traffic
from spa_jax.split.latency import device_seconds, fit_network, network_seconds, side_flops, total_seconds
from spa_jax.split.simulated import Network


def test_table_2s_network_column_by_hand():
    """31 exchanges of 33 taps of 4096 numbers of two bytes down, and one vector up, at 3.82 ms and 1 Gbit/s."""
    traffic = Traffic(exchanges=31, bytes_down=31 * 33 * 4096 * 2, bytes_up=31 * 4096 * 2)
    by_hand = 31 * (3.82e-3 + 8 * 34 * 4096 * 2 / 1e9)
    assert network_seconds(traffic, Network()) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.18, rel=0.05)


def test_a_device_takes_its_flops_and_all_times_add_up():
    assert device_seconds(2e9, 1e12) == pytest.approx(2e-3)
    assert device_seconds(2e9, 1e12, processors=3) == pytest.approx(6e-3)
    assert total_seconds(1.0, 2.0, 4.0) == 7.0


def test_flops_are_two_for_each_weight_of_a_matrix():
    tokenwise = PluginConfig("s1", SideConfig("tokenwise", 6, (0, 2, 3)), 32)
    sizes = {
        path[-1].key: leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(init_plugin(tokenwise, abstract=True))
    }
    assert side_flops(tokenwise) == 2 * (sizes["down"] + sizes["adapter_in"] + sizes["adapter_out"] + sizes["output"])
    attending = PluginConfig("s1", SideConfig("transformer", 8, (0, 2, 3), 2), 32)
    shapes = jax.tree.leaves(init_plugin(attending, abstract=True))
    matrices = sum(leaf.size for leaf in shapes if leaf.ndim > 1 and leaf.shape != (3, 8))  # norms
    assert side_flops(attending, context_length=5) - side_flops(attending, context_length=4) == 3 * 4 * 8
    assert side_flops(attending, context_length=0) == 2 * matrices


def test_the_fit_finds_the_network_that_made_the_measurements():
    sizes = np.array([1e3, 1e4, 1e5, 1e6])
    noise = 1e-6 * np.random.default_rng(0).standard_normal(4)
    network = fit_network(sizes, 2e-3 + 8 * sizes / 5e8 + noise)
    assert network.tau == pytest.approx(2e-3, rel=0.01)
    assert network.down == network.up == pytest.approx(5e8, rel=0.01)


@pytest.mark.parametrize(("sizes", "seconds", "named"), [([5, 5], [1, 2], "two sizes"), ([1, 2], [2, 1], "longer")])
def test_measurements_that_fit_no_network_are_refused(sizes, seconds, named):
    with pytest.raises(UserError, match=named):
        fit_network(sizes, seconds)
