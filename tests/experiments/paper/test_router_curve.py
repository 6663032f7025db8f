"""Curves of the router, measured once, from losses and entropies of the test split."""

import jax
import numpy as np
import pytest

from experiments.paper import router_curve
from experiments.paper.cells import plugin_training
from spa_jax.data.tasks import load_split
from spa_jax.decoding.encoders import task_encoder
from spa_jax.weights.plugin import load_plugin


def test_the_entropy_is_that_of_the_backbones_next_token(tiny_store):
    plugin = load_plugin(tiny_store.train(plugin_training(tiny_store.scale, "xsum")) / "plugin")
    outcomes, entropy = router_curve.outcomes_of(tiny_store, plugin, "xsum")
    encoder = task_encoder(tiny_store.backbone, plugin.template, "xsum")
    examples, _ = encoder.encode_all(load_split("xsum", tiny_store.directory("xsum"), "test"))
    assert len(entropy) == len(outcomes.base) == sum(len(example.targets) for example in examples)
    model, variables = tiny_store.backbone.model(), {"params": tiny_store.backbone.params}

    @jax.jit
    def log_probabilities(tokens, positions):
        hidden = model.apply(variables, tokens, positions).hidden
        return jax.nn.log_softmax(model.apply(variables, hidden, method="logits"))

    expected = []
    for example in examples:
        positions = np.arange(len(example.tokens), dtype=np.int32)[None]
        log_p = np.asarray(log_probabilities(example.tokens[None], positions))[0, example.predict]
        expected += (-(np.exp(log_p) * log_p).sum(-1)).tolist()
    np.testing.assert_allclose(np.sort(entropy), np.sort(expected), rtol=1e-4)


def test_curves_are_measured_once_and_a_perfect_router_is_no_worse_than_any(tiny_store, monkeypatch):
    found = router_curve.curves(tiny_store, "xsum")
    for name in ("router", "random", "entropy of f"):
        assert found["perfect router"]["least"] <= found[name]["least"] + 1e-9
        assert found[name]["loss"][0] == pytest.approx(found["random"]["loss"][0], abs=1e-3)
        assert found[name]["loss"][-1] == pytest.approx(found["random"]["loss"][-1], abs=1e-3)
    monkeypatch.setattr(router_curve, "outcomes_of", lambda *_: pytest.fail("measured again"))
    assert router_curve.curves(tiny_store, "xsum") == found
