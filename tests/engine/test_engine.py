"""Sessions of all kinds in one batch say what each of them says alone, wait for nobody, and leave nothing behind."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_split import CONTEXT, EOS, FINGERPRINT, NEW, TIE, make_plugin, make_prompts

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import Sampling
from spa_jax.engine import calls, programs, schedule, slots
from spa_jax.engine.extents import UNIT
from spa_jax.engine.schedule import Pace
from spa_jax.split.generation import generate
from spa_jax.split.head import head_of
from spa_jax.split.messages_pb2 import Reply, Tensor
from spa_jax.split.request import device_for, open_message
from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone


@pytest.fixture(scope="module")
def backbone(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, max_position_embeddings=4 * CONTEXT)
    return Backbone("tiny", config, tiny_params, None, EOS, FINGERPRINT)


@pytest.fixture(scope="module")
def cloud(backbone):
    return Cloud(backbone)


def _requests():
    """A plugin and its request for every kind of session."""
    kinds = [
        (("spa", "tokenwise"), {}),
        (("spa", "transformer"), {"threshold": 0.4}),
        (("spa", "tokenwise"), {"setting": "base"}),
        (("s2", "tokenwise"), {"codec": "int8"}),
        (("s1", "tokenwise"), {"reply": "token", "sampling": Sampling(0.9, 30, 0.95), "seed": 4}),
        (("spa", "tokenwise"), {"sampling": Sampling(1.2), "seed": 3}),
        (("spa", "transformer"), {"beams": Beams(3, 0.7, True)}),
        (("s3", "tokenwise"), {"beams": Beams(4, 1.0, "never")}),
        (("spa", "tokenwise", 7, 2), {}),
        (("spa", "transformer", 7, 2, "all"), {}),
        (("spa", "tokenwise", 8, 2, "all"), {"beams": Beams(2)}),
        (("spa", "tokenwise", 9, 0), {"threshold": 0.6, "sampling": Sampling(0.7), "codec": "bfloat16"}),
    ]
    found = []
    for seed, (which, how) in enumerate(kinds):
        setting, *rest = which
        plugin = make_plugin({"s1": "spa", "s3": "s2"}.get(setting, setting), *rest)
        prompts = make_prompts(seed)[: 1 + seed % 3]
        found.append((plugin, open_message(plugin, prompts, NEW + seed % 4, **({"setting": setting} | how))))
    return found


def test_a_generation_in_one_process_gives_its_slots_back_at_once(backbone):
    cloud = Cloud(backbone)
    generate(cloud, *_requests()[0])
    assert cloud.engine.slots.taken == UNIT * len(cloud.engine.prefixes._by_use)


def test_sessions_of_all_kinds_say_together_what_each_says_alone(backbone, cloud):
    requests, head = _requests(), head_of(backbone)
    alone = [generate(cloud, *each, head=head).generations for each in requests]
    sessions = [cloud.open(request) for _, request in requests]
    devices = [device_for(*each, session.lengths, head) for each, session in zip(requests, sessions)]
    rng, going = np.random.default_rng(0), list(range(len(sessions)))
    while going:
        which = going[rng.integers(len(going))]
        session, device = sessions[which], devices[which]
        for part in session.prompt_messages():
            device.receive(part)
        question = session.next_question()
        if question is None:
            going.remove(which)
        else:
            session.apply_reply(device.receive(question))
    for session, expected in zip(sessions, alone, strict=True):
        assert session.degraded == 0
        for a, b in zip(session.result(), expected, strict=True):
            assert (a.tokens, a.consulted) == (b.tokens, b.consulted)
            assert a.score == (None if b.score is None else pytest.approx(b.score, abs=TIE))


def test_who_waits_for_a_device_holds_nobody_up(cloud):
    plugin = make_plugin("s1")
    waits = cloud.open(open_message(plugin, make_prompts(1), NEW))
    first = waits.next_question()
    others = [generate(cloud, plugin, open_message(plugin, make_prompts(2), NEW)) for _ in range(2)]
    assert others[0].generations == others[1].generations
    waits.apply_reply(None)
    assert waits.next_question().step == first.step + 1


def test_rows_that_are_ready_go_in_one_call(cloud, monkeypatch):
    plugin, rows = make_plugin("s1"), []
    requests = [open_message(plugin, make_prompts(seed)[:2], NEW) for seed in range(3)]
    sessions = [cloud.open(request) for request in requests]
    devices = [device_for(plugin, request, session.lengths) for request, session in zip(requests, sessions)]
    questions = [session.next_question() for session in sessions]

    def counted(*arguments, **static):
        rows.append(int((arguments[4].start < programs.PADDING).sum()))
        return programs.run_steps(*arguments, **static)

    monkeypatch.setattr(calls, "run_steps", counted)
    for session, device, question in zip(sessions, devices, questions):
        session.apply_reply(device.receive(question))
    sessions[0].settle()
    assert rows == [6]


def test_rows_that_are_ready_wait_for_others_that_are_about_to_be(cloud, monkeypatch):
    """Also where the first answer comes after it was last asked whether to wait."""
    plugin = make_plugin("s1")
    requests = [open_message(plugin, make_prompts(seed)[:1], NEW) for seed in range(2)]
    sessions = [cloud.open(request) for request in requests]
    devices = [device_for(plugin, request, session.lengths) for request, session in zip(requests, sessions)]
    for _ in range(2):
        questions = [session.next_question() for session in sessions]
        for session, device, question in zip(sessions, devices, questions):
            session.apply_reply(device.receive(question))
    questions = [session.next_question() for session in sessions]
    monkeypatch.setattr(Pace, "step", lambda *_: 60.0)
    sessions[0].apply_reply(devices[0].receive(questions[0]))
    sessions[1]._groups[0]._waits = [20.0]
    before = dataclasses.replace(cloud.engine.tally)
    assert cloud.engine.go_on()
    assert cloud.engine.tally == before
    assert 0 < cloud.engine.hold() <= 60
    sessions[1].apply_reply(devices[1].receive(questions[1]))
    assert cloud.engine.hold() == 0
    assert cloud.engine.go_on()
    assert (cloud.engine.tally.steps, cloud.engine.tally.rows) == (before.steps + 1, before.rows + 2)


def test_a_call_ends_where_a_row_ends_and_has_few_steps(cloud, monkeypatch):
    plugin, counts = make_plugin("spa"), []
    request = open_message(plugin, make_prompts(3)[:1], 20, setting="base")
    generate(cloud, plugin, request)  # it is known how long a step takes
    monkeypatch.setattr(schedule, "STEP_SECONDS", 1e9)

    def counted(*arguments, **static):
        found = programs.run_steps(*arguments, **static)
        counts.append(int(found[1].num_steps))
        return found

    monkeypatch.setattr(calls, "run_steps", counted)
    (generation,) = generate(cloud, plugin, request).generations
    monkeypatch.setattr(schedule, "STEP_SECONDS", 0)
    assert generate(cloud, plugin, request).generations == [generation]
    whole, rest = divmod(len(generation.tokens), programs.MAX_STEPS)
    assert counts == [programs.MAX_STEPS] * whole + [rest] * (rest > 0) + [1] * len(generation.tokens)


def test_a_long_prompt_runs_in_parts_and_others_go_on_between(cloud, monkeypatch):
    monkeypatch.setattr(Pace, "step", lambda *_: 1e-9)
    monkeypatch.setattr(schedule, "STEP_SECONDS", 0)
    monkeypatch.setattr(schedule, "FRESH_SECONDS", 0)
    plugin = make_plugin("spa", "transformer", 7, 2, "all")
    long = np.random.default_rng(0).integers(0, 97, 3 * UNIT + 5).tolist()
    request = open_message(plugin, [long], NEW)
    alone = generate(cloud, plugin, request).generations
    busy = cloud.open(open_message(make_plugin("spa"), make_prompts(4), 3 * NEW, setting="base"))
    session, turns = cloud.open(request), 0
    while not session.is_settled:
        before = sum(len(each.tokens) for each in busy.result())
        cloud.engine.turn(), cloud.engine.turn()
        turns += 1
        assert busy.is_settled or turns < 3 or sum(len(each.tokens) for each in busy.result()) > before
    assert turns >= 2
    device = device_for(plugin, request, session.lengths)
    while (question := session.next_question()) is not None:
        session.apply_reply(device.receive(question))
    assert session.result() == alone


@pytest.mark.parametrize("end", ["freed", "forgotten"])
def test_sessions_that_leave_give_their_slots_back(end, backbone):
    cloud, plugin = Cloud(backbone), make_plugin("s1")
    for _ in range(70):
        session = cloud.open(open_message(plugin, [[1, 2]], NEW))
        if end == "freed":
            session.free()
        del session
    assert cloud.engine.slots.size == slots.FIRST_UNITS * UNIT
    assert len(cloud.engine._groups) <= 1


def test_the_cache_grows_when_it_is_full_and_keeps_what_it_holds(backbone, monkeypatch):
    plugin, request = make_plugin("s1"), open_message(make_plugin("s1"), make_prompts(5), NEW)
    alone = generate(Cloud(backbone), plugin, request).generations
    monkeypatch.setattr(slots, "FIRST_UNITS", 4)
    cloud = Cloud(backbone)
    session = cloud.open(request)
    device, question = device_for(plugin, request, session.lengths), session.next_question()
    other = cloud.open(request)
    assert cloud.engine.slots.size == 8 * UNIT
    while question is not None:
        session.apply_reply(device.receive(question))
        question = session.next_question()
    assert session.result() == alone
    assert not other.is_settled or other.next_question().step == 1


def test_no_call_copies_the_cache(backbone):
    """Its temporary memory does not grow with the cache, which is changed in place."""
    sizes = []
    for units in (64, 256):
        cloud = Cloud(backbone)
        cloud.engine.slots.take(units)
        captured = []

        def capture(*arguments, captured=captured, **static):
            captured.append(programs.run_steps.lower(*arguments, **static).compile().memory_analysis())
            return programs.run_steps(*arguments, **static)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calls, "run_steps", capture)
            generate(cloud, make_plugin("s1"), open_message(make_plugin("s1"), [[1, 2, 3]], 1))
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(cloud.engine.slots.cache))
        assert captured[0].alias_size_in_bytes >= cache
        sizes.append((cache, captured[0].temp_size_in_bytes))
    (small, before), (large, after) = sizes
    assert large >= 2 * small
    assert after < before + 0.05 * (large - small)


def test_prompts_of_several_sessions_run_in_one_call(backbone, cloud, monkeypatch):
    """Also those that the device corrects, from the entry on; and what they say is what each says alone."""
    monkeypatch.setattr(Pace, "part_tokens", lambda *_: 512)
    plugin, shapes = make_plugin("spa", "transformer", 7, 2, "all"), []
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 97, length).tolist() for length in (70, 5, 100)]
    requests = [open_message(plugin, [prompt], NEW) for prompt in prompts]
    alone = [generate(cloud, plugin, request).generations for request in requests]
    for name, tokens in (("run_prompts", 3), ("finish_prompts", 3)):

        def counted(*arguments, name=name, at=tokens, **static):
            shapes.append((name, arguments[at].shape[:2]))
            return getattr(programs, name)(*arguments, **static)

        monkeypatch.setattr(calls, name, counted)
    sessions = [cloud.open(request) for request in requests]
    devices = [device_for(plugin, request, session.lengths) for request, session in zip(requests, sessions)]
    asked = [session.next_question() for session in sessions]
    assert shapes == [("run_prompts", (4, 64)), ("run_prompts", (2, 64))]
    while any(question is not None for question in asked):
        for session, device, question in zip(sessions, devices, asked):
            if question is not None:
                session.apply_reply(device.receive(question))
        asked = [question and session.next_question() for session, question in zip(sessions, asked)]
    assert [session.result() for session in sessions] == alone
    assert ("finish_prompts", (4, 64)) in shapes or ("finish_prompts", (2, 64)) in shapes


def test_newcomers_do_not_overtake_a_long_prompt_again_and_again(backbone, monkeypatch):
    """Whoever has been served goes behind those who wait, and not behind those who come later."""
    monkeypatch.setattr(Pace, "part_tokens", lambda *_: schedule.PART)
    cloud, plugin, rng, parts = Cloud(backbone), make_plugin("spa"), np.random.default_rng(0), 3

    def come(length):
        prompt = rng.integers(0, 97, length).tolist()
        return cloud.open(open_message(plugin, [prompt], 1, setting="base"))

    long, others = come(parts * schedule.PART), []
    for _ in range(3 * parts):  # at most three turns for each part: of who came meanwhile a prompt, and a token
        others.append(come(schedule.PART))
        cloud.engine.turn()
    assert long._groups[0].first == parts * schedule.PART


@pytest.mark.parametrize(
    ("setting", "edits", "how"),
    [("s1", "targets", {}), ("s1", "all", {}), ("spa", "targets", {"threshold": 1.0})],
    ids=["every token", "the prompt too", "the router's offset"],
)
def test_corrections_that_are_beyond_all_numbers_spoil_no_other_session(setting, edits, how, backbone):
    """One session is beside them, and another one has their slots in view, behind a mask. Corrections are in units of a
    state that is louder than 1, so that these are infinite."""
    embedding = {"embedding": 100 * backbone.params["embed"]["embedding"]}
    backbone = dataclasses.replace(backbone, params={**backbone.params, "embed": embedding}, eos_ids=())
    huge, evil = float(np.finfo(np.float32).max), make_plugin(setting, "tokenwise", 7, 1, edits)
    short, long = list(range(NEW)), list(range(UNIT - 2 * NEW))
    request = open_message(evil, [short], 6 * NEW, codec="float32", **how)
    if request.offset:
        request.offset = np.full(len(request.offset) // 4, huge, np.float32).tobytes()
    plugin = make_plugin("spa", "tokenwise", 8, 1)
    honest = [open_message(plugin, [prompt], 3 * NEW) for prompt in (short, long)]
    alone = [generate(Cloud(backbone), plugin, each).generations for each in honest]

    cloud = Cloud(backbone)
    beside, session = cloud.open(honest[0]), cloud.open(request)
    device = device_for(plugin, honest[0], beside.lengths)
    going = [session, beside]
    while going:
        for each in list(going):
            question = each.next_question()
            if question is None:
                going.remove(each)
            elif each is beside:
                each.apply_reply(device.receive(question))
            else:
                values = np.full(len(question.rows) * backbone.config.hidden_size, huge, np.float32)
                each.apply_reply(Reply(step=question.step, g=Tensor(values=values.tobytes())))
    session.free()
    after = generate(cloud, plugin, honest[1]).generations
    assert [beside.result(), after] == alone
