"""Parts of a line are given out without overlap, and again once they are free."""

import numpy as np

from spa_jax.engine.extents import Extents, count_units, power_of_two


def test_extents_never_overlap_and_gaps_are_filled_first():
    rng, extents, taken = np.random.default_rng(0), Extents(40), []
    for _ in range(300):
        if taken and rng.random() < 0.5:
            extents.free(taken.pop(rng.integers(len(taken))))
            continue
        count = int(rng.integers(1, 9))
        new, used = extents.take(count), {place for extent in taken for place in extent}
        gaps = [begin for begin in range(41 - count) if not used & set(range(begin, begin + count))]
        assert new == (range(gaps[0], gaps[0] + count) if gaps else None)
        taken += [] if new is None else [new]


def test_a_line_can_grow():
    extents = Extents(3)
    assert (extents.take(2), extents.take(2)) == (range(2), None)
    extents.size = 4
    assert extents.take(2) == range(2, 4)


def test_sizes_are_rounded_up():
    assert [count_units(slots) for slots in (1, 64, 65, 129)] == [1, 1, 2, 3]
    assert [power_of_two(least) for least in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 4, 8, 16]
