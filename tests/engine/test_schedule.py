"""What runs next: prompts beside each other, steps of many rows, and nobody who waits for long."""

import math

import numpy as np
import pytest

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import GREEDY
from spa_jax.engine.group import Group, Task
from spa_jax.engine.programs import MAX_STEPS
from spa_jax.engine.schedule import (
    FRESH_SECONDS,
    LATE,
    MAX_PART_TOKENS,
    PART,
    STEP_SECONDS,
    Pace,
    choose_parts,
    choose_rows,
    count_steps,
    gather_until,
    hold_until,
    is_step_due,
)

FIXED, PER_ROW = 0.06, 0.01


def make_group(
    length=64, since=0, entry=9, columns=1, generated=1, corrects_prompt=False, attends=False, usual=math.inf, at=0.0
):
    """A group that waits since a time, and usually for so many seconds."""
    kernel, none = np.zeros((0, 2), np.float32), np.zeros(0, np.float32)
    task = Task(
        kernel, none, 0.5, routed=True, asks=True, adds=True, entry=entry, enters_at_head=False, taps=(0,),
        attends=attends, corrects_prompt=corrects_prompt, eos_ids=(), limit=9, sampling=GREEDY, seed=0,
        beams=Beams(columns) if columns > 1 else None, keep=lambda taps: taps,
    )  # fmt: skip
    group = Group(task, 0, [1] * length, entry, range(128))
    group.since, group.waits_since = since, at
    group.hypotheses = [each.extended(1, False, 0.0) if generated else each for each in group.hypotheses]
    group._waits = [usual]
    return group


@pytest.fixture
def pace():
    """A step takes some time, and more for each row."""
    pace = Pace()
    for rows in (1, 2, 4, 8, 16, 32):
        pace.took_step(rows, FIXED + PER_ROW * rows)
    return pace


def test_a_call_that_compiles_is_not_taken_for_the_usual():
    pace = Pace()
    assert (pace.step(1), pace.part_tokens(False)) == (STEP_SECONDS, PART)
    for seconds in (5.0, 0.1, 0.2):
        pace.took_step(3, seconds)
        pace.took_prompts(100, seconds)
    assert pace.step(4) == pace.step(3) == pace.step(1) == pace.step(32) == 0.1
    assert [pace.part_tokens(others_wait) for others_wait in (True, False)] == [500, MAX_PART_TOKENS]
    pace.took_step(8, 0.4)
    assert [pace.step(rows) for rows in (4, 8, 32)] == [0.1, 0.4, 0.4]


def test_prompts_run_together_as_far_as_they_fit_and_the_oldest_is_among_them():
    groups = [make_group(length, since) for length, since in ((100, 3), (20, 2), (64, 1), (64, 4), (64, 5))]
    assert choose_parts(groups, PART) == [groups[2]]
    assert choose_parts(groups, 2 * PART) == [groups[2], groups[1]]
    assert choose_parts(groups, 4 * PART) == [groups[at] for at in (2, 1, 0, 3)]
    short = [make_group(10, since=at) for at in range(9)]
    assert choose_parts(short, PART) == short[:4]


def test_prompts_of_different_programs_run_apart():
    groups = [make_group(), make_group(entry=2), make_group(corrects_prompt=True), make_group(), make_group()]
    groups[3].is_opened = True
    assert choose_parts(groups, 512) == [groups[0], groups[4]]


def test_rows_of_one_kind_take_a_step_together():
    groups = [make_group(since=at, entry=9 - at % 2) for at in range(80)]
    chosen = choose_rows(groups[1:])
    assert [group.since for group in chosen] == list(range(1, 65, 2))
    assert len(choose_rows([make_group(columns=8) for _ in range(9)])) == 4


def test_prompts_take_no_longer_than_a_step_between_steps(pace):
    rows = [make_group() for _ in range(8)]
    assert not is_step_due(rows, FIXED + 7 * PER_ROW, pace)
    assert is_step_due(rows, FIXED + 8 * PER_ROW, pace)
    fresh = [make_group(generated=0) for _ in range(8)]
    assert not is_step_due(fresh, FRESH_SECONDS - 0.1, pace)
    assert is_step_due(fresh, FRESH_SECONDS, pace)


def test_a_call_has_several_steps_where_nobody_needs_another(pace):
    alone = [make_group()]
    assert count_steps(alone, [], False, 0.0, pace) == int(STEP_SECONDS / (FIXED + PER_ROW))
    assert count_steps(alone, [make_group()], False, 0.0, pace) > 1
    assert count_steps(alone, [make_group(usual=0.01)], False, 0.0, pace) == 1
    assert count_steps(alone, [make_group(usual=0.01)], False, 0.02, pace) == 1
    assert count_steps(alone, [make_group(usual=0.01)], False, LATE * 0.01, pace) > 1
    assert count_steps(alone, [], True, 0.0, pace) == 1
    assert count_steps([make_group(attends=True)], [], False, 0.0, pace) == 1
    pace.took_step(1, 1e-4)
    assert count_steps(alone, [], False, 0.0, pace) == MAX_STEPS


@pytest.mark.parametrize(
    ("ready", "usual", "until"),
    [
        (1, [], 0.0),
        (1, [math.inf], 0.0),
        (8, [0.02] * 8, 0.06),
        (8, [0.01] * 8, 0.03),
        (2, [0.01, 0.3], 0.03),
        (2, [0.01, 0.0125, 0.3], 3 * 0.0125),
        (2, [0.01, math.inf], 0.03),
        (8, [0.02], 0.0),
        (8, [0.3], 0.0),
        (32, [0.01], 0.0),
        (31, [0.01, 0.02], 0.03),
    ],
)
def test_rows_are_held_for_answers_that_usually_come_before_a_second_step_would_be_over(ready, usual, until, pace):
    """For three times as long as usual, and no longer than what steps take whatever their rows, which one saves."""
    rows, waiting = [make_group() for _ in range(ready)], [make_group(usual=at) for at in usual]
    assert hold_until(rows, waiting, 0.0, 0.0, pace) == until


def test_rows_are_held_no_longer_for_others_that_come_later_or_too_late(pace):
    """And for none whom they could take no step with."""
    ready, soon = [make_group()], [make_group(usual=0.02, at=0.99)]
    assert hold_until(ready, soon, 1.0, 1.0, pace) == pytest.approx(0.99 + 3 * 0.02)
    assert hold_until(ready, soon, 1.0, 0.98, pace) == pytest.approx(0.98 + FIXED)
    assert hold_until(ready, soon, 1.0, 0.9, pace) == 1.0
    assert hold_until(ready, [make_group(usual=0.02, at=0.96)], 1.0, 0.98, pace) == pytest.approx(0.96 + 3 * 0.02)
    assert hold_until(ready, [make_group(usual=0.02, at=0.9)], 1.0, 1.0, pace) == 1.0
    assert hold_until(ready, [make_group(entry=3, usual=0.02, at=0.99)], 1.0, 1.0, pace) == 1.0


def test_prompts_are_held_for_others_by_what_they_take_until_a_call_is_full(pace):
    prompts = [make_group(length, generated=0) for length in (64, 16)]
    assert gather_until(prompts, 3.0, pace) == 3.0, "nothing is known of how long prompts take"
    pace.took_prompts(100, 0.5)
    assert gather_until(prompts[:1], 3.0, pace) == pytest.approx(3.0 + 0.05 * 64 * 0.005)
    assert gather_until(prompts, 3.0, pace) == pytest.approx(3.0 + 0.05 * 80 * 0.005)
    assert gather_until([make_group(900)] * 2, 3.0, pace) == pytest.approx(3.0 + 0.05 * 128 * 0.005)
    assert gather_until([make_group()] * 4, 3.0, pace) == 3.0, "a call of prompts takes a second at most"
