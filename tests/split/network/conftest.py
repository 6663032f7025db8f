"""A cloud over a backbone as it is loaded from disk, and a plugin for it."""

import pytest
from tiny_split import random_plugin

from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone


@pytest.fixture(scope="module")
def backbone(tiny_backbone_directory) -> Backbone:
    return load_backbone(str(tiny_backbone_directory))


@pytest.fixture(scope="module")
def cloud(backbone) -> Cloud:
    return Cloud(backbone)


@pytest.fixture(scope="module")
def plugin(backbone) -> Plugin:
    """Always asked, so that every token is an exchange."""
    return random_plugin(backbone, "s1")
