"""What several sessions begin with is run once, and they say what each says alone."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_split import CONTEXT, EOS, FINGERPRINT, NEW, explained, make_plugin

from spa_jax.decoding.beam import Beams
from spa_jax.engine import calls, engine, programs
from spa_jax.engine.engine import NoRoom
from spa_jax.engine.extents import UNIT, Extents
from spa_jax.engine.prefixes import Node, Prefixes, copy_units
from spa_jax.engine.schedule import Pace
from spa_jax.split.generation import generate
from spa_jax.split.request import device_for, open_message
from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone


@pytest.fixture(scope="module")
def backbone(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, max_position_embeddings=4 * CONTEXT)
    return Backbone("tiny", config, tiny_params, None, EOS, FINGERPRINT)


@pytest.fixture
def cloud(backbone):
    return Cloud(backbone)


@pytest.fixture
def run_tokens(monkeypatch):
    """How many tokens of prompts each call has run."""
    counts = []
    monkeypatch.setattr(Pace, "part_tokens", lambda *_: 512)

    def counted(*arguments, **static):
        parts, places = arguments[4], arguments[6]
        ends = np.minimum(parts.first + arguments[3].shape[1], parts.length)
        counts.append(int((ends - parts.first)[places.start < programs.PADDING].sum()))
        return programs.run_prompts(*arguments, **static)

    monkeypatch.setattr(calls, "run_prompts", counted)
    return counts


def make_prompts(*lengths, seed=0, common=2 * UNIT + 5):
    """Prompts that begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 97, common).tolist()
    return [shared + rng.integers(0, 97, length).tolist() for length in lengths]


def answer(session, plugin, request, question):
    """Answers a session to its end."""
    device = device_for(plugin, request, session.lengths)
    while question is not None:
        session.apply_reply(device.receive(question))
        question = session.next_question()
    return session.result()


@pytest.mark.parametrize(
    ("plugin", "how", "run_again"),
    [
        (("spa",), {}, False),
        (("spa",), {"setting": "base"}, False),
        (("spa", "tokenwise", 7, 2), {}, False),
        (("spa", "tokenwise", 7, 2), {"beams": Beams(3)}, False),
        (("s1", "transformer"), {}, True),
        (("spa", "tokenwise", 7, 2, "all"), {}, False),
        (("spa", "tokenwise", 7, 2, "all"), {"beams": Beams(3)}, False),
        (("spa", "tokenwise", 7, 2, "all"), {"own": b""}, True),
        (("spa", "transformer", 7, 2, "all"), {}, True),
    ],
    ids=str,
)
def test_tokens_are_the_same_with_and_without(plugin, how, run_again, backbone, cloud, run_tokens):
    """A side network that attends needs what only running a prompt gives, and what is corrected is its device's own."""
    plugin, how = make_plugin(*plugin), dict(how)
    own = how.pop("own", None)
    first, second = (open_message(plugin, [prompt], NEW, **how) for prompt in make_prompts(20, 30))
    for request in (first, second):
        request.own = request.own if own is None else own
    fresh = generate(Cloud(backbone), plugin, second).generations
    generate(cloud, plugin, first)
    run_tokens.clear()
    found = generate(cloud, plugin, second).generations
    assert sum(run_tokens) == 30 + (2 * UNIT + 5 if run_again else 0)
    for prompt, a, b in zip(second.prompts, found, fresh):
        same = (a.tokens, a.consulted) == (b.tokens, b.consulted)
        setting = how.get("setting", plugin.config.setting)
        assert same or explained(backbone, plugin, setting, list(prompt.tokens), how.get("beams"), 0.5, b, a)


def test_sessions_that_come_together_wait_for_the_first(cloud, run_tokens):
    plugin = make_plugin("s1")
    requests = [open_message(plugin, [prompt], NEW) for prompt in make_prompts(9, 11, 13)]
    alone = [generate(Cloud(cloud._backbone), plugin, request).generations for request in requests]
    run_tokens.clear()
    sessions = [cloud.open(request) for request in requests]
    questions = [session.next_question() for session in sessions]
    assert sum(run_tokens) == 2 * UNIT + 5 + 9 + 11 + 13
    assert cloud.engine.prefixes.reused == 2 * (2 * UNIT + 5)
    found = [answer(*each) for each in zip(sessions, [plugin] * 3, requests, questions)]
    assert found == alone


def test_one_that_leaves_does_not_keep_others_waiting(cloud, run_tokens):
    plugin = make_plugin("s1")
    requests = [open_message(plugin, [prompt], NEW) for prompt in make_prompts(9, 11)]
    sessions = [cloud.open(request) for request in requests]
    cloud.engine.turn()
    sessions[0].free()
    sessions[1].settle()
    assert sum(run_tokens) == UNIT + 2 * UNIT + 5 + 11


@pytest.mark.parametrize(("entry", "setting", "whole"), [("head", "s1", True), (2, "s1", False), (2, "base", True)])
def test_an_answer_is_shared_where_nothing_has_corrected_its_keys(entry, setting, whole, cloud, run_tokens):
    plugin = make_plugin("s1", "tokenwise", 7, entry)
    (prompt,) = make_prompts(UNIT - 5)
    request = open_message(plugin, [prompt], NEW, setting=setting)
    (said,) = generate(cloud, plugin, request).generations
    longer = [*prompt, *said.tokens, *range(40)]
    run_tokens.clear()
    session = cloud.open(open_message(plugin, [longer], NEW, setting=setting))
    session.next_question()
    assert sum(run_tokens) == 41 if whole else 41 + len(said.tokens)


def test_others_are_kept_apart(cloud, run_tokens):
    plugin = make_plugin("s1")
    plans = [cloud.plan(open_message(plugin, [prompt], NEW)) for prompt in make_prompts(9, 11)]
    for namespace, again in (("a", True), ("b", True), (None, True), (None, True), ("a", False), ("b", False)):
        run_tokens.clear()
        session = cloud.begin(plans[0], namespace)
        session.settle()
        session.free()
        assert sum(run_tokens) == len(plans[0].prompts[0]) - (0 if again else len(plans[0].prompts[0]) - 1)


def test_what_was_used_least_recently_makes_room(cloud, run_tokens):
    plugin = make_plugin("s1")
    prompts = [make_prompts(9, seed=seed)[0] for seed in range(4)]
    cloud.engine.slots.bound(
        12 * cloud.engine.slots.unit_bytes
    )  # one session with three units, and what it shares of three prompts

    def run(prompt):
        run_tokens.clear()
        session = cloud.open(open_message(plugin, [prompt], NEW))
        session.settle()
        session.free()
        return sum(run_tokens)

    whole = len(prompts[0])
    assert [run(prompts[at]) for at in (0, 1, 2, 0)] == [whole, whole, whole, 1]
    assert [run(prompts[at]) for at in (3, 0, 2)] == [whole, 1, 1]
    assert run(prompts[1]) == whole
    held = [cloud.open(open_message(plugin, [prompt], NEW)) for prompt in prompts]
    assert cloud.engine.prefixes._by_use == {}
    with pytest.raises(NoRoom):
        cloud.open(open_message(plugin, [prompts[3]], NEW))
    for session in held:
        session.free()
    assert run(prompts[3]) == whole


def test_copies_change_the_cache_in_place(cloud):
    cloud.engine.slots.take(1)
    cache = cloud.engine.slots.cache
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    slots = np.arange(cache["k"].shape[1], dtype=np.float32)[:, None, None]
    filled = jax.tree.map(lambda leaf: jax.numpy.broadcast_to(slots, leaf.shape), cache)
    places = np.zeros((2, 4), np.int32)
    places[:, :2] = (0, 3 * UNIT), (5 * UNIT, 7 * UNIT)
    memory = copy_units.lower(filled, *places, np.int32(2)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 8
    copied = np.asarray(copy_units(filled, *places, np.int32(2))["k"])[0, :, 0, 0].reshape(-1, UNIT)[:, 0] // UNIT
    assert copied[:9].tolist() == [0, 1, 2, 3, 4, 0, 6, 3, 8]


def test_units_are_given_out_from_both_ends():
    extents = Extents(6)
    assert [extents.take(2), extents.take(1, from_end=True), extents.take(1, from_end=True)] == [
        range(2), range(5, 6), range(4, 5),
    ]  # fmt: skip
    extents.free(range(5, 6))
    assert extents.take(2) == range(2, 4)
    assert extents.take(1) == range(5, 6)
    assert extents.take(1, from_end=True) is None


@pytest.mark.parametrize(("entry", "edits"), [("head", "targets"), (2, "targets"), (2, "all")])
def test_each_turn_of_a_conversation_runs_what_is_new_and_says_what_it_says_alone(entry, edits, cloud, run_tokens):
    """But for the prompt's last token, which the device may have corrected."""
    plugin = make_plugin("spa", "tokenwise", 7, entry, edits)
    rng, talk, before = np.random.default_rng(3), [], 0
    for turn in range(5):
        talk += rng.integers(0, 97, 20 + turn).tolist()
        request = open_message(plugin, [talk], NEW)
        (alone,) = generate(Cloud(cloud._backbone), plugin, request).generations
        run_tokens.clear()
        result = generate(cloud, plugin, request)
        (said,) = result.generations
        assert (said.tokens, said.consulted) == (alone.tokens, alone.consulted)
        assert sum(run_tokens) <= len(talk) - before + (turn > 0)
        assert sum(run_tokens) == len(talk) - before + (turn > 0) or entry == "head"  # which keeps answers, too
        before = len(talk)
        talk += said.tokens


def test_a_conversation_that_could_not_be_corrected_on_is_uncorrected_as_a_whole(backbone, cloud, run_tokens):
    plugin = make_plugin("spa", "tokenwise", 7, 2, "all")
    short, long = make_prompts(20, 30)
    generate(cloud, plugin, open_message(plugin, [short], NEW))
    request = open_message(plugin, [long], NEW)

    def unanswered(cloud):
        session = cloud.open(request)
        assert session.next_question().prompt
        session.apply_reply(None)
        while session.next_question() is not None:
            session.apply_reply(None)
        assert session.uncorrected_prompts == 1
        return session.result()[0].tokens

    assert unanswered(cloud) == unanswered(Cloud(backbone))
    assert len(run_tokens) > 2
    run_tokens.clear()
    generate(cloud, plugin, open_message(plugin, [long], NEW))  # of which nothing was kept
    assert sum(run_tokens) == 30


def test_corrected_prompts_are_their_devices_own(cloud, run_tokens):
    """Whatever another device says that it corrects, nobody else goes on with it."""
    (prompt,) = make_prompts(20)
    for seed, own in ((7, None), (8, None), (7, b"another process")):
        plugin = make_plugin("spa", "tokenwise", seed, 2, "all")
        request = open_message(plugin, [prompt], NEW)
        request.own = request.own if own is None else own
        run_tokens.clear()
        (said,) = generate(cloud, plugin, request).generations
        assert sum(run_tokens) == len(prompt)
        assert said == generate(Cloud(cloud._backbone), plugin, request).generations[0]


def test_nothing_is_left_of_whom_no_block_is_kept(cloud):
    """Each device process has a secret of its own for what it has corrected."""
    plugin = make_plugin("spa", "tokenwise", 7, 2, "all")
    cloud.engine.slots.bound(4 * cloud.engine.slots.unit_bytes)
    for number in range(6):
        request = open_message(plugin, make_prompts(20, seed=number), NEW)
        request.own = f"process {number}".encode()
        generate(cloud, plugin, request)
    prefixes = cloud.engine.prefixes
    assert 0 < len(prefixes._roots) <= 4
    while prefixes.evict():
        pass
    assert prefixes._roots == {}


def count_alike(one, other):
    return max(count for count in range(9) if one[:count] == other[:count] and count <= min(len(one), len(other)))


def test_the_block_that_is_most_alike_is_that_of_an_exhaustive_search():
    rng, root = np.random.default_rng(0), Node((), range(0), None, 0)
    for _ in range(200):
        block = tuple(rng.integers(0, 3, rng.integers(1, 8)).tolist())
        known = {child.block: child for child in root.children}
        if block not in known:
            root.add(block, range(0), 0)
        elif rng.random() < 0.5:
            root.remove(known[block])
        wanted = tuple(rng.integers(0, 3, rng.integers(1, 8)).tolist())
        counts = [count_alike(child.block, wanted) for child in root.children]
        child, count = root.most_alike(wanted)
        assert count == max(counts, default=0)
        assert child is None if not count else child.block[:count] == wanted[:count]


def test_a_turn_copies_for_few_prompts_however_many_wait(cloud, run_tokens, monkeypatch):
    monkeypatch.setattr(engine, "MAX_ROWS", 3)
    plugin, copied = make_plugin("s1"), []
    copy = Prefixes.copy
    monkeypatch.setattr(Prefixes, "copy", lambda self, *places: (copied.append(places), copy(self, *places)))
    first = cloud.open(open_message(plugin, make_prompts(9), NEW))
    first.settle()
    sessions = [cloud.open(open_message(plugin, make_prompts(9, seed=0)[:1], NEW)) for _ in range(8)]
    while not all(session.is_settled for session in sessions):
        copied.clear()
        cloud.engine.turn()
        assert len(copied) <= 3 + 3  # before prompts run, and after
    assert all(session.next_question() is not None for session in sessions)
