"""A small backbone in the cloud, and compilation that does not optimise."""

import dataclasses

import pytest
from tiny_split import CONTEXT, EOS, FINGERPRINT

from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone


@pytest.fixture(scope="session")
def backbone(tiny_config, tiny_params) -> Backbone:
    config = dataclasses.replace(tiny_config, max_position_embeddings=CONTEXT)
    return Backbone("tiny", config, tiny_params, None, EOS, FINGERPRINT)


@pytest.fixture(scope="session")
def cloud(backbone) -> Cloud:
    return Cloud(backbone)
