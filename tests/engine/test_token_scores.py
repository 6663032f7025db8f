"""What is told of each token: its log-probability, p(consult), and penalties, by logits of the whole text run anew."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import scipy.special
from tiny_split import CONTEXT, FINGERPRINT, _rerun, make_plugin, make_prompts

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import Penalties, Sampling
from spa_jax.errors import UserError
from spa_jax.models.llama import Llama
from spa_jax.split.generation import generate
from spa_jax.split.head import head_of
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone

NEW, THRESHOLD = 16, 0.5


@pytest.fixture(scope="module")
def backbone(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, max_position_embeddings=4 * CONTEXT)
    return Backbone("tiny", config, tiny_params, None, (), FINGERPRINT)


@pytest.fixture(scope="module")
def cloud(backbone):
    return Cloud(backbone)


def rerun(backbone, plugin, prompt, tokens, threshold):
    """Logits `[N,V]` and p(consult) `[N]` of each new token, each by the whole text before it."""
    text = np.zeros((1, 64), np.int32)
    text[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    model = Llama(backbone.config, plugin.config.taps, entry=plugin.config.entry)
    found = []
    for count in range(len(tokens)):
        length, first = np.array([len(prompt) + count]), len(prompt) - 1
        common = (backbone.params, plugin.params, text, length, first)
        logits, *_ = _rerun(model, plugin.config, "spa", *common, threshold, np.ones(64, bool))
        _, _, probability, _ = _rerun(model, plugin.config, "spa", *common, 0.0, np.ones(64, bool))
        found.append((np.asarray(logits)[0], float(probability[0])))
    logits, probabilities = zip(*found)
    return np.stack(logits), np.array(probabilities)


def penalized(logits, tokens, penalties):
    """Logits of each token, less what those before it take off, one by one."""
    lowered = logits.copy()
    for row, _ in enumerate(tokens):
        for token, count in Counter(tokens[:row]).items():
            lowered[row, token] -= penalties.frequency * count + penalties.presence
    return lowered


@pytest.mark.parametrize("entry", ["head", 2])
def test_of_each_token_it_is_told_how_likely_it_was_and_whether_the_router_asks(entry, backbone, cloud):
    plugin = make_plugin("spa", entry=entry)
    prompts = make_prompts(3)[:2]
    requests = [
        open_message(plugin, prompts, NEW, scored=True),
        open_message(plugin, prompts, NEW, scored=True, sampling=Sampling(1.5, 40, 0.9), seed=2),
    ]
    sessions = [cloud.open(request) for request in requests]  # together, beside one that wants nothing of it
    bystander = cloud.open(open_message(plugin, prompts, NEW))
    for request, session in zip(requests, sessions):
        for prompt, each in zip(prompts, generate(cloud, plugin, request).generations):
            logits, probabilities = rerun(backbone, plugin, prompt, each.tokens, THRESHOLD)
            judged = scipy.special.log_softmax(logits, axis=-1)[np.arange(NEW), each.tokens]
            np.testing.assert_allclose(each.logprobs, judged, atol=2e-5)
            np.testing.assert_allclose(each.p_consult, probabilities, atol=2e-6)
            assert [p > THRESHOLD for p in each.p_consult] == each.consulted
            assert 0 < sum(each.consulted) < NEW
        session.free()
    bystander.free()
    (plain, _) = generate(cloud, plugin, open_message(plugin, prompts, NEW)).generations
    assert np.isnan(plain.logprobs).all()
    (base, _) = generate(cloud, plugin, open_message(plugin, prompts, NEW, setting="base", scored=True)).generations
    assert not base.p_consult
    assert np.isfinite(base.logprobs).all()


@pytest.mark.parametrize("penalties", [Penalties(0.7, 0.0), Penalties(0.0, 2.0), Penalties(-1.0, 0.4)], ids=str)
def test_penalties_are_taken_off_what_an_answer_has_said(penalties, backbone, cloud):
    plugin = make_plugin("spa", entry=2)
    prompts = make_prompts(3)[:2]
    without = generate(cloud, plugin, open_message(plugin, prompts, NEW)).generations
    beside = cloud.open(open_message(plugin, prompts, NEW))
    with_them = generate(
        cloud, plugin, open_message(plugin, prompts, NEW, penalties=penalties, scored=True)
    ).generations
    for prompt, each in zip(prompts, with_them):
        logits, _ = rerun(backbone, plugin, prompt, each.tokens, THRESHOLD)
        assert each.tokens == penalized(logits, each.tokens, penalties).argmax(axis=-1).tolist()
        judged = scipy.special.log_softmax(logits, axis=-1)[np.arange(NEW), each.tokens]
        np.testing.assert_allclose(each.logprobs, judged, atol=2e-5)
    assert [each.tokens for each in with_them] != [each.tokens for each in without]
    beside.free()


def test_a_token_that_the_device_chose_has_no_known_probability(backbone, cloud):
    plugin = make_plugin("spa")
    request = open_message(plugin, make_prompts(3)[:1], NEW, setting="s1", reply="token", scored=True)
    (only,) = generate(cloud, plugin, request, head=head_of(backbone)).generations
    assert np.isnan(only.logprobs).all()


@pytest.mark.parametrize("wrong", [Penalties(2.1, 0), Penalties(0, float("nan"))], ids=str)
def test_penalties_out_of_range_are_refused(wrong, cloud):
    with pytest.raises(UserError, match=r"_penalty is .*, but must be between -2 and 2"):
        cloud.open(open_message(make_plugin("spa"), [[1]], NEW, penalties=wrong))


def test_a_search_takes_no_penalties(cloud):
    request = open_message(make_plugin("spa"), [[1]], NEW, penalties=Penalties(1.0, 0.0), beams=Beams(2))
    with pytest.raises(UserError, match="a beam search takes no texts that end an answer and no penalties"):
        cloud.open(request)
