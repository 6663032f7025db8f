"""The router's curve against sums by hand and an exhaustive search."""

from itertools import combinations

import numpy as np
import pytest

from spa_jax.scoring.router_curve import gap_recovered, loss_by_share, random_loss_by_share

SKIPPED, ASKED = np.array([4.0, 1.0, 3.0, 2.0]), np.array([1.0, 2.0, 2.0, 2.0])


def test_tokens_are_asked_for_by_their_scores():
    """Gains of 3, -1, 1 and 0, taken in the order 2, 0, 3, 1."""
    losses = loss_by_share(SKIPPED, ASKED, np.array([0.5, 0.1, 0.9, 0.2]))
    assert losses.tolist() == [10 / 4, 9 / 4, 6 / 4, 6 / 4, 7 / 4]


def test_by_the_gain_itself_no_choice_is_better():
    losses = loss_by_share(SKIPPED, ASKED, SKIPPED - ASKED)
    for count in range(5):
        best = min(
            np.where(np.isin(np.arange(4), chosen), ASKED, SKIPPED).mean() for chosen in combinations(range(4), count)
        )
        assert losses[count] == best


def test_chance_recovers_one_half_and_scores_that_say_nothing_about_as_much():
    assert gap_recovered(random_loss_by_share(SKIPPED, ASKED)) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    skipped, asked = rng.random(4000) + 1, rng.random(4000)
    assert gap_recovered(loss_by_share(skipped, asked, rng.random(4000))) == pytest.approx(0.5, abs=0.03)


def test_the_gap_recovered_is_the_area():
    """Losses 10, 7, 6, 6, 7 of four tokens, by hand: (0 + 3 + 4 + 4 + 3) / 3 with half the ends, over four."""
    losses = loss_by_share(SKIPPED, ASKED, SKIPPED - ASKED)
    assert gap_recovered(losses) == pytest.approx((3 + 4 + 4 + 1.5) / 3 / 4)
    with pytest.raises(ValueError, match="no gap"):
        gap_recovered(loss_by_share(SKIPPED, SKIPPED, ASKED))
