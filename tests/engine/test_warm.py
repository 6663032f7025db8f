"""After the engine is warm, no session of the lengths it was warmed for compiles a program."""

import dataclasses

import numpy as np
import pytest
from tiny_split import EOS, FINGERPRINT, make_plugin

from spa_jax.engine import calls, schedule, warm
from spa_jax.engine.extents import UNIT
from spa_jax.split.generation import generate
from spa_jax.split.request import device_for, open_message
from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone

PROGRAMS = ("run_prompts", "finish_prompts", "run_steps")


@pytest.fixture
def backbone(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, max_position_embeddings=2 * UNIT)
    return Backbone("tiny", config, tiny_params, None, EOS, FINGERPRINT)


def compiled() -> dict[str, int]:
    return {name: getattr(calls, name)._cache_size() for name in PROGRAMS}


def test_sessions_compile_nothing_that_was_warmed(backbone, monkeypatch):
    for module in (schedule, warm):
        monkeypatch.setattr(module, "MAX_ROWS", 2)
        monkeypatch.setattr(module, "MAX_PART_TOKENS", UNIT)
    cold, cloud = Cloud(backbone), Cloud(backbone)
    cloud.engine.slots.bound(20 * UNIT * cloud.engine.slots.unit_bytes // UNIT)
    left = list(cloud.engine.warm(UNIT + UNIT // 2))
    assert left == list(range(len(left), 0, -1))
    known = compiled()
    assert sum(known.values()) >= len(left)
    rng = np.random.default_rng(0)
    said = []
    for lengths in ([3], [30, 40], [50], [9, 20], [80], [60, 85]):
        prompts = [rng.integers(1, 97, length).tolist() for length in lengths]
        for plugin in (make_plugin("spa", "tokenwise"), make_plugin("spa", "tokenwise", 7, 2, "all")):
            said.append((plugin, open_message(plugin, prompts, 8, threshold=0.3)))
    warmed = [generate(cloud, *each).generations for each in said]
    assert compiled() == known
    assert warmed == [generate(cold, *each).generations for each in said]


def test_what_compiles_leaves_sessions_and_kept_prefixes_alone(backbone):
    cloud = Cloud(backbone)
    cloud.engine.slots.bound(20 * UNIT * cloud.engine.slots.unit_bytes // UNIT)
    rng = np.random.default_rng(0)
    beginning = rng.integers(1, 97, UNIT + 8).tolist()
    plugin = make_plugin("s1", "tokenwise", 7, 2)
    request = open_message(plugin, [[*beginning, *rng.integers(1, 97, 9).tolist()]], 20)
    expected = generate(Cloud(backbone), plugin, request).generations

    generate(cloud, plugin, open_message(plugin, [beginning], 2))  # which is kept
    device = None
    session = cloud.open(request)
    for _ in cloud.engine.warm(UNIT):
        device = device or device_for(plugin, request, session.lengths)
        if (question := session.next_question()) is not None:
            session.apply_reply(device.receive(question))
    assert cloud.engine.prefixes.reused >= UNIT
    while (question := session.next_question()) is not None:
        session.apply_reply(device.receive(question))
    assert session.result() == expected
