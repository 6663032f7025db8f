"""Scores on cases worked by hand, and intervals against closed forms."""

import math

import numpy as np
import pytest

from spa_jax.scoring.answers import against_humans, exact_match, f1, words
from spa_jax.scoring.bootstrap import estimate
from spa_jax.scoring.rouge import KINDS, UnicodeTokenizer, is_scoreable, rouge, sentences
from spa_jax.scoring.scores import repetition


def test_rouge_of_a_text_that_stops_early():
    """Three of six words, two of five bigrams, nothing wrong: precision 1, recall 1/2 and 2/5."""
    scores = rouge("The cat sat", ["the cat sat on the mat"])
    expected = {"rouge1": 200 / 3, "rouge2": 400 / 7, "rougeL": 200 / 3, "rougeLsum": 200 / 3}
    assert scores == pytest.approx(expected)


def test_rouge_l_goes_by_order_and_rouge_1_does_not():
    """In "b a" against "a b" one word is in order."""
    scores = rouge("beta alpha", ["alpha beta"])
    assert (scores["rouge1"], scores["rouge2"], scores["rougeL"]) == pytest.approx((100, 0, 50))


def test_rouge_lsum_goes_by_sentences():
    """The same two sentences in another order: each is found whole, while over the text only one is in order."""
    scores = rouge("Dogs bark loud. Cats sleep long.", ["Cats sleep long. Dogs bark loud."])
    assert (scores["rougeL"], scores["rougeLsum"]) == pytest.approx((50, 100))


def test_rouge_knows_word_stems_and_takes_the_best_reference():
    assert rouge("running dogs", ["run dog"])["rouge1"] == pytest.approx(100)
    assert rouge("a red fox", ["blue whale", "a red fox", "red"])["rouge2"] == pytest.approx(100)
    assert rouge("", ["something"])["rougeL"] == 0
    with pytest.raises(ValueError, match="at least one reference"):
        rouge("anything", [])


SCRIPTS = ["да, конечно", "日本語です", "한국어 입니다", "हिन्दी में", "ภาษาไทย", "Ελλάδα σήμερα", "مرحبا بالعالم"]


@pytest.mark.parametrize("text", SCRIPTS)
def test_the_same_text_in_any_script_is_found_whole(text):
    assert rouge(text, [text], "unicode") == dict.fromkeys(KINDS, 100)
    assert rouge("another", [text], "unicode") == dict.fromkeys(KINDS, 0)
    assert is_scoreable(text, "unicode")
    assert not is_scoreable(text)
    assert rouge(text, [text]) == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Да, конечно! 3.5", ["да", "конечно", "3.5"]),
        ("日本語です。", ["日", "本", "語", "で", "す"]),
        ("It's 42%", ["it's", "42"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("e\u0301te\u0301 \u00e9t\u00e9", ["\u00e9t\u00e9"] * 2),
        ("\uff76\uff80\uff76\uff85 カタカナ", ["カタカナ"] * 2),
        ("😀 ... _", []),
    ],
)
def test_words_of_any_script(text, tokens):
    assert UnicodeTokenizer().tokenize(text) == tokens
    assert is_scoreable(text, "unicode") == bool(tokens)


def test_in_plain_english_both_tokenizers_find_the_same():
    """Where no word has a stem of its own."""
    said, wanted = "The cat sat on a mat. A dog ran", ["the cat sat", "A dog! The mat."]
    assert rouge(said, wanted, "unicode") == pytest.approx(rouge(said, wanted))
    assert rouge("running", ["run"], "unicode")["rouge1"] == 0


def test_rouge_lsum_goes_by_sentences_of_other_scripts():
    """As in English: the same two sentences in another order."""
    scores = rouge("犬が吠える。猫が眠る。", ["猫が眠る。犬が吠える。"], "unicode")
    assert scores["rougeLsum"] == pytest.approx(100)
    assert scores["rougeL"] < 60


def test_repetition_is_the_share_of_runs_of_four_words_that_were_there_before():
    """In "a b c d a b c d" five runs, of which the last is the first again."""
    assert repetition("a b c d a b c d") == pytest.approx(20)
    assert repetition("a a a a a a") == pytest.approx(200 / 3)
    assert repetition("one two three four five") == repetition("too short") == repetition("") == 0


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." She left.\nAnd so on', ['He said "no."', "She left.", "And so on"]),
        ("It costs 3.5 pounds (or so.) Yes", ["It costs 3.5 pounds (or so.)", "Yes"]),
        ("\n\n one \n", ["one"]),
        ("犬\uff01「猫。」鳥", ["犬\uff01", "「猫。」", "鳥"]),
        ("क्या? हाँ। ठीक", ["क्या?", "हाँ।", "ठीक"]),
        ("", []),
    ],
)
def test_sentences_end_where_they_should(text, lines):
    assert sentences(text).splitlines() == lines


def test_words_that_count():
    assert words("The  U.S.A.'s an-swer, a THEme!") == ["usas", "answer", "theme"]


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "overlap"),
    [
        ("The white cat.", "a white cat", 1, 1),
        ("white cat", "the cat", 0, 2 / 3),
        ("cat cat", "cat", 0, 2 / 3),
        ("in the big red barn", "barn", 0, 2 / 5),
        ("dog", "cat", 0, 0),
        ("the", "an", 1, 1),
        ("the", "cat", 0, 0),
        ("", "cat", 0, 0),
    ],
)
def test_answers_worked_by_hand(said, wanted, exact, overlap):
    assert exact_match(said, wanted) == exact
    assert f1(said, wanted) == pytest.approx(overlap)
    assert f1(wanted, said) == pytest.approx(overlap)


def test_several_people_are_left_out_one_at_a_time():
    """Only the first agrees: leaving it out once in four costs a quarter."""
    assert against_humans(exact_match, "yes", ["yes", "no", "maybe", "never"]) == 3 / 4
    assert against_humans(exact_match, "yes", ["yes", "yes.", "maybe", "never"]) == 1
    assert against_humans(f1, "white cat", ["the cat"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one reference"):
        against_humans(f1, "yes", [])


def test_an_interval_is_as_wide_as_the_normal_one_where_there_is_much():
    values = np.random.default_rng(0).standard_normal(1000)
    found = estimate(values)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    assert found.low < found.mean < found.high
    assert estimate(values) == found
    assert estimate(values, seed=1) != found


def test_rows_of_a_group_stand_and_fall_together():
    """Twenty copies of each of fifty values say no more than the fifty."""
    values = np.random.default_rng(1).standard_normal(50)
    copied, alone = estimate(np.repeat(values, 20), np.repeat(np.arange(50), 20)), estimate(values)
    assert copied == pytest.approx(alone)
    careless = estimate(np.repeat(values, 20))
    assert (careless.high - careless.low) < 0.3 * (copied.high - copied.low)


def test_groups_weigh_by_their_rows():
    """The mean is that of the rows, whatever the groups."""
    values, groups = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    found = estimate(values, groups)
    assert found.mean == 0.75
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_difference_that_is_always_the_same_is_sure_and_one_group_is_never():
    assert estimate([0.5] * 9) == pytest.approx((0.5, 0.5, 0.5))
    assert estimate([1.0, 2.0], ["a", "a"]) == (1.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="0 values"):
        estimate([])
    with pytest.raises(ValueError, match="2 values and 1 groups"):
        estimate([1.0, 2.0], ["a"])
