"""Weights that lie as a TPU reads them are the same weights."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_split import EOS, FINGERPRINT, make_plugin

from spa_jax.engine.layouts import HEADS_FIRST, lay_out
from spa_jax.models.partitioner import SINGLE_DEVICE, Partitioner
from spa_jax.models.quantized import quantize
from spa_jax.split.generation import generate
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone


class OfTpu(Partitioner):
    """Says that the processor here is a TPU."""

    @property
    def platform(self):
        return "tpu"


@pytest.fixture
def backbone(tiny_config, tiny_params):
    return Backbone("tiny", tiny_config, tiny_params, None, EOS, FINGERPRINT)


def order(leaf):
    return leaf.format.layout.major_to_minor


def test_generations_are_the_same(backbone):
    plugin = make_plugin("spa", "tokenwise")
    request = open_message(plugin, [[1, 5, 9], [7, 7]], 8, threshold=0.3)
    expected = generate(Cloud(backbone), plugin, request).generations
    own = jax.tree.map(lambda leaf: leaf.copy(), backbone.params)
    laid = lay_out(dataclasses.replace(backbone, params=own, partitioner=OfTpu()))
    assert [order(laid.params["blocks"]["attention"][name]["kernel"]) for name in "qkv"] == 3 * [HEADS_FIRST]
    rest = [laid.params["blocks"]["attention"]["o"], laid.params["blocks"]["mlp"], laid.params["embed"]]
    assert all(order(leaf) == tuple(range(leaf.ndim)) for leaf in jax.tree.leaves(rest))
    jax.tree.map(np.testing.assert_array_equal, laid.params, backbone.params)
    laid = dataclasses.replace(laid, partitioner=SINGLE_DEVICE)
    assert generate(Cloud(laid), plugin, request).generations == expected


def test_matrices_in_8_bits_move_too(backbone):
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize("/".join(key.key for key in path), leaf.copy()), backbone.params
    )
    laid = lay_out(dataclasses.replace(backbone, params=params, partitioner=OfTpu()))
    assert order(laid.params["blocks"]["attention"]["q"]["kernel"].qvalue) == HEADS_FIRST


def test_elsewhere_nothing_moves(backbone):
    assert lay_out(backbone) is backbone
