"""Corrections that enter in front of an inner block: two programs say what one says, and both what the judge says."""

import dataclasses
from itertools import product

import jax
import numpy as np
import pytest
from tiny_split import NEW, TIE, explained, generate_and_record, judge, make_plugin, make_prompts

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.prompt_store import PromptStore
from spa_jax.decoding.sampling import Sampling
from spa_jax.engine.schedule import Pace
from spa_jax.models.plugin import init_plugin
from spa_jax.split import opening as opening_module
from spa_jax.split.generation import generate
from spa_jax.split.messages_pb2 import Reply, Taps
from spa_jax.split.request import device_for, open_message
from spa_jax.split.simulated import Network, Simulated
from spa_jax.split.wire import WireError

CASES = list(product((0, 2), ("targets", "all"), ("tokenwise", "transformer"), (None, 3)))
SHORT = {
    (0, "targets", "tokenwise", None), (0, "all", "transformer", 3), (2, "targets", "transformer", 3),
    (2, "all", "tokenwise", 3), (2, "all", "transformer", None),
}  # fmt: skip
"""Combinations of the default suite: each two of entry, edits, kind and width are met together."""
THRESHOLDS = (0.5, 0.35)


def _said(generations):
    return [(generation.tokens, generation.consulted) for generation in generations]


def _both(cloud, backbone, plugin, prompts, threshold=0.5, beams=None, **how):
    setting = plugin.config.setting
    one = FusedModel(backbone, plugin, setting, threshold).generate(prompts, NEW, beams=beams, **how)
    request = open_message(plugin, prompts, NEW, threshold=threshold, beams=beams, **how)
    return one, generate(cloud, plugin, request)


@pytest.mark.parametrize("setting", ["spa", pytest.param("s2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("entry", "edits", "kind", "width"),
    [case if case in SHORT else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_the_split_result_is_the_fused_one_and_the_judges(entry, edits, kind, width, setting, backbone, cloud):
    beams, flags, judged = Beams(width) if width else None, [], 0
    for seed, threshold in enumerate(THRESHOLDS):
        plugin, prompts = make_plugin(setting, kind, seed + 7, entry, edits), make_prompts(seed + 3)
        one, split = _both(cloud, backbone, plugin, prompts, threshold, beams)
        assert (split.degraded, split.uncorrected_prompts, split.traffic.lost) == (0, 0, 0)
        assert (split.traffic.opening_exchanges > 0) == (edits == "all")
        for prompt, a, b in zip(prompts, one, split.generations):
            flags += b.consulted
            if _said([a]) != _said([b]):
                assert explained(backbone, plugin, setting, prompt, beams, threshold, a, b)
            verdict = judge(backbone, plugin, setting, prompt, beams, threshold)
            if min(verdict.gaps) > TIE:
                judged += 1
                assert _said([verdict.generation]) == _said([a])
    assert judged >= 6
    assert 0.1 < sum(flags) / len(flags) < 0.9


def test_a_seed_draws_what_it_draws_in_one_process(backbone, cloud):
    plugin, prompts = make_plugin("spa", "tokenwise", 7, 0), make_prompts(5)
    one, split = _both(cloud, backbone, plugin, prompts, sampling=Sampling(0.9, top_k=20, top_p=0.95), seed=3)
    assert split.generations == one
    assert _said(one) != _said(_both(cloud, backbone, plugin, prompts)[0])


ENTRIES = [(0, "targets", "tokenwise", None), (2, "all", "transformer", None)]


@pytest.mark.parametrize(("entry", "edits", "kind", "width"), ENTRIES)
def test_a_prompt_gives_alone_what_it_gives_in_a_batch_after_it_was_kept_and_where_it_begins_another(
    entry, edits, kind, width, backbone, cloud
):
    plugin, other = (make_plugin("spa", kind, seed, entry, edits) for seed in (7, 8))
    first, *_, last = sorted(make_prompts(3), key=len)
    prompts, store = [last[: len(first)], last, first, last[:-1]], PromptStore(1.0)
    fresh, split = _both(cloud, backbone, plugin, prompts)  # the split one runs every prompt by itself
    assert _said(fresh) == _said(split.generations)
    alone = generate(cloud, plugin, open_message(plugin, [last] * len(prompts), NEW))
    assert _said(alone.generations) == _said(fresh[1:2]) * len(prompts)
    kept = [FusedModel(backbone, who, "spa", 0.5, store).generate(prompts, NEW) for who in (other, plugin)]
    assert store.hits == 1
    assert _said(kept[1]) == _said(fresh) != _said(kept[0])


def test_a_store_tells_entries_and_edits_apart(backbone):
    class Keys(PromptStore):
        def get(self, key, *_):
            keys.append(key)
            raise InterruptedError

    keys = []
    for entry, edits in ((0, "targets"), (0, "all"), (2, "targets"), (2, "all"), ("head", "targets")):
        plugin = make_plugin("spa", "transformer", 7, 0, "targets")
        plugin = dataclasses.replace(plugin, config=dataclasses.replace(plugin.config, entry=entry, edits=edits))
        with pytest.raises(InterruptedError):
            FusedModel(backbone, plugin, "spa", prompts=Keys(1.0)).generate([[1, 2, 3]], NEW)
    assert len(keys) == len(set(keys)) == 5


@pytest.mark.parametrize(
    ("setting", "entry", "edits", "kind"),
    [
        ("spa", 0, "targets", "tokenwise"),
        ("spa", 2, "all", "transformer"),
        ("s1", 2, "targets", "transformer"),
        pytest.param("s1", 0, "all", "tokenwise", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_plugin_is_the_base(setting, entry, edits, kind, backbone, cloud):
    config, prompts = make_plugin(setting, kind, 7, entry, edits).config, make_prompts(3)
    plugin = dataclasses.replace(make_plugin(setting, kind, 7, entry, edits), params=init_plugin(config))
    base = [generation.tokens for generation in FusedModel(backbone, None).generate(prompts, NEW)]
    arrays = []
    for threshold in (0.0, 1.0) if setting == "spa" else (0.5,):
        model = FusedModel(backbone, plugin, setting, threshold)
        state = model.advance(model.start(prompts, NEW), Sampling(), NEW)
        arrays.append((state.cache, state.slot_mask, state.position, state.hypotheses.tokens))
        one = model.generate(prompts, NEW)
        assert [generation.tokens for generation in one] == base
        assert {generation.consulted_share for generation in one} == {float(threshold < 1)}
        if setting == "spa":
            request = open_message(plugin, prompts, NEW, threshold=threshold)
            assert generate(cloud, plugin, request).generations == one
    jax.tree.map(np.testing.assert_array_equal, arrays[0], arrays[-1])


# edits = all: the opening

OPENINGS = [("tokenwise", 3), ("transformer", None)]
PROMPTS = make_prompts(19)


def _opening(kind, width, seed=7, **how):
    plugin = make_plugin("spa", kind, seed, 2, "all")
    request = open_message(plugin, PROMPTS, NEW, beams=Beams(width) if width else None, **how)
    request.own = b""  # all of the prompt is corrected, whatever was before
    return plugin, request


def _judged(backbone, plugin, width, lost=frozenset(), **how):
    """Verdicts of the judge on all prompts, where float noise cannot decide."""
    beams, verdicts = Beams(width) if width else None, []
    for group, prompt in enumerate(PROMPTS):
        missing = {token for lost_group, token in lost if lost_group == group}
        verdicts.append(judge(backbone, plugin, "spa", prompt, beams, lost=missing, **how))
    assert min(min(verdict.gaps) for verdict in verdicts) > TIE, "float noise could decide this: choose another seed"
    return _said(verdict.generation for verdict in verdicts)


@pytest.mark.parametrize(("kind", "width"), OPENINGS)
def test_an_opening_is_asked_in_parts_and_answered_at_every_position(kind, width, cloud, monkeypatch):
    plugin, request = _opening(kind, width)
    whole, _ = generate_and_record(cloud, plugin, request)
    monkeypatch.setattr(opening_module, "CHUNK_POSITIONS", 7)
    result, channel = generate_and_record(cloud, plugin, request)
    assert result.generations == whole.generations
    asked = [Taps.FromString(message) for message, _ in channel.exchanged]
    opening = [taps for taps in asked if taps.prompt]
    assert asked[: len(opening)] == opening
    assert [taps.step for taps in asked] == [1 + number for number in range(len(asked))]
    assert not any(taps.base or taps.origins for taps in opening)
    for taps, (_, reply) in zip(opening, channel.exchanged):
        assert len(Reply.FromString(reply).g.values) == 4 * 32 * len(taps.positions) <= 4 * 32 * 7
    where = [(row // (width or 1), position) for taps in opening for row, position in zip(taps.rows, taps.positions)]
    every = [(group, position) for group, prompt in enumerate(PROMPTS) for position in range(len(prompt))]
    assert where == every
    for taps in asked[len(opening) :]:  # what the device has got is not sent again
        assert all(position >= len(PROMPTS[row // (width or 1)]) for row, position in zip(taps.rows, taps.positions))
    assert not channel.sent
    traffic = result.traffic
    assert (traffic.opening_exchanges, traffic.exchanges) == (len(opening), len(asked) - len(opening))


@pytest.mark.parametrize(("kind", "width"), OPENINGS)
def test_messages_of_an_opening_that_come_twice_mean_what_they_mean_once(kind, width, cloud, monkeypatch):
    monkeypatch.setattr(Pace, "part_tokens", lambda *_: 512)  # else it depends on the time which prompts run together
    plugin, request = _opening(kind, width)
    once, channel = generate_and_record(cloud, plugin, request)
    twice, again = generate_and_record(cloud, plugin, request, times=2)
    assert twice.generations == once.generations
    assert again.exchanged == channel.exchanged


@pytest.mark.parametrize("outcome", ["question lost", "answer lost"])
@pytest.mark.parametrize(("kind", "width"), OPENINGS)
def test_one_lost_part_of_an_opening_leaves_the_prompts_uncorrected(kind, width, outcome, backbone, cloud, monkeypatch):
    monkeypatch.setattr(opening_module, "CHUNK_POSITIONS", 7)
    plugin, request = _opening(kind, width)
    result, channel = generate_and_record(
        cloud, plugin, request, lambda exchange: outcome if exchange in (2, 4, 7) else "arrives"
    )
    assert (result.uncorrected_prompts, result.traffic.opening_exchanges) == (len(PROMPTS), 3)
    assert result.degraded == len(channel.lost) > 1
    assert _said(result.generations) == _judged(backbone, plugin, width, channel.lost, corrects_prompt=False)
    assert _said(result.generations) != _judged(backbone, plugin, width, channel.lost)
    sent = [Taps.FromString(message) for message in channel.sent]
    assert all(taps.prompt and taps.step == 0 for taps in sent)
    where = [(row, position) for taps in sent for row, position in zip(taps.rows, taps.positions)]
    every = [(group, position) for group, prompt in enumerate(PROMPTS) for position in range(len(prompt) - 1)]
    assert where == (every if kind == "transformer" else [])


def test_an_opening_that_is_slower_than_the_deadline_is_counted_apart(backbone, cloud):
    """The largest part takes longer than the deadline, and no question about new tokens does."""
    plugin, request = _opening("transformer", None)
    network = Network(tau=0.002, down=1e6, deadline=0.04)
    result = generate(cloud, plugin, request, lambda answer: Simulated(answer, network))
    traffic = result.traffic
    assert (result.uncorrected_prompts, result.degraded, traffic.lost) == (len(PROMPTS), 0, 0)
    assert _said(result.generations) == _judged(backbone, plugin, None, corrects_prompt=False)
    on_the_way = 8 * (traffic.bytes_down / network.down + traffic.bytes_up / network.up)
    assert traffic.network_seconds == pytest.approx(traffic.exchanges * network.tau + on_the_way)
    assert traffic.opening_seconds > network.deadline


@pytest.mark.parametrize(("kind", "width"), OPENINGS)
def test_a_device_that_is_never_asked_is_not_asked_about_prompts(kind, width, backbone, cloud):
    plugin, request = _opening(kind, width, threshold=1.0)
    result = generate(cloud, plugin, request)
    assert (result.traffic.opening_exchanges, result.traffic.exchanges, result.uncorrected_prompts) == (0, 0, 0)
    assert _said(result.generations) == _judged(backbone, plugin, width, threshold=1.0)


def test_a_wrong_answer_to_an_opening_is_refused_and_the_right_one_still_taken(cloud):
    plugin, request = _opening("transformer", None)
    session = cloud.open(request)
    device = device_for(plugin, request, session.lengths)
    while (question := session.next_question()) is not None:
        right = device.receive(question)
        if question.step <= 2:
            for wrong, says in [
                (Reply(step=7, g=right.g), f"step 7 came where one of step {question.step} is due"),
                (Reply(step=question.step, g={"values": right.g.values[128:]}), "bytes"),
                (Reply(step=question.step, g={"values": b"\xff" * len(right.g.values)}), "not finite"),
            ]:
                with pytest.raises(WireError, match=says):
                    session.apply_reply(wrong)
        session.apply_reply(right)
    assert session.result() == generate(cloud, plugin, request).generations
    assert (session.degraded, session.uncorrected_prompts) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(("kind", "width"), OPENINGS)
def test_an_opening_by_another_codec_says_nearly_the_same(kind, width, codec, cloud):
    results = [generate(cloud, *_opening(kind, width, codec=name)) for name in ("float32", codec)]
    exact, rounded = ([g.tokens[0] for g in result.generations] for result in results)
    assert sum(a == b for a, b in zip(exact, rounded)) >= 3
    assert results[1].traffic.prefill_bytes < 0.6 * results[0].traffic.prefill_bytes
