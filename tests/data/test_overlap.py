"""Held-out rows that are trained on too, against all pairs compared one by one."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_jax.data.overlap import SHINGLE, find_overlap, warn_of_overlap
from spa_jax.data.pairs import Pair, Turn


def rows(*sources):
    return [Pair(source, "x", origin=f"row {number}") for number, source in enumerate(sources, start=1)]


def index_of_jaccard(one, other):
    a, b = ({text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))} for text in (one, other))
    return len(a & b) / len(a | b)


WORDS = st.lists(st.sampled_from("the cat sat on mat dog ran far a b".split()), min_size=1, max_size=14)


@settings(max_examples=200)
@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=4), st.randoms(use_true_random=False))
def test_what_is_found_is_what_comparing_all_pairs_finds(trained, held, draw: random.Random):
    for words in trained[: len(trained) // 2]:  # so that some are alike
        changed = list(words)
        changed[draw.randrange(len(words))] = "bird"
        held = [*held, changed]
    train, held_out = (rows(*(" ".join(words) for words in part)) for part in (trained, held))
    overlap = find_overlap(train, held_out)
    sources = {pair.source for pair in train}
    assert [pair for pair, _ in overlap.same] == [pair for pair in held_out if pair.source in sources]
    near = [
        pair
        for pair in held_out
        if pair.source not in sources and any(index_of_jaccard(pair.source, other) >= 0.8 for other in sources)
    ]
    assert [pair for pair, _ in overlap.near] == near
    assert all(pair.source == other.source for pair, other in overlap.same)
    assert all(index_of_jaccard(pair.source, other.source) >= 0.8 for pair, other in overlap.near)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("what is  my CAT called,\nplease?", "same"),
        ("What is my cat called please", "near"),
        ("What is my dog called, please?", None),
        ("彼女の猫の名前は何ですか", "same"),
        ("彼女の猫の名前は何ですか!", "near"),
    ],
)
def test_case_and_white_space_are_no_matter_and_a_comma_is_little(source, kind):
    train = rows("What is my cat called, please?", "彼女の猫の名前は何ですか")
    overlap = find_overlap(train, rows(source))
    assert [name for name in ("same", "near") if getattr(overlap, name)] == ([kind] if kind else [])


def test_conversations_are_the_same_if_all_that_is_asked_is():
    def talk(*sources):
        first, *later = rows(*sources)
        return Pair(first.source, "x", later=tuple(later), context=(Turn("system", "a long text " * 20),))

    train = [talk("Hello!", "How old is my cat, do you know that?")]
    assert find_overlap(train, [talk("Hello!", "Where did I go to school?")]) == ([], [])
    assert len(find_overlap(train, [talk("Hello!", "How old is my cat, do you know that?")]).same) == 1


def test_the_warning_counts_and_names_the_first(caplog):
    train = rows("What is my cat called, please?", "Where did I go to school?")
    warn_of_overlap(train, rows("Who am I?"))
    assert not caplog.messages
    warn_of_overlap(train, rows("Who am I?", "Where did I go to school?", "What is my cat called please?"))
    assert caplog.messages == [
        "of 3 held-out rows, 1 ask the same and 1 ask nearly the same as a training row (row 2 is like row 2): their "
        "loss says little of other questions"
    ]
