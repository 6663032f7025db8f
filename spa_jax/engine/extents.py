"""Who has which part of the cache's slots: each group's slots lie side by side, so nothing is moved or looked up."""

UNIT = 64
"""Slots are given out in multiples of so many."""


class Extents:
    """Ranges of a line of `size` places, given out to whoever asks, from either end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken: list[range] = []

    @property
    def taken(self) -> int:
        """Places that somebody has."""
        return sum(map(len, self._taken))

    def take(self, count: int, from_end: bool = False) -> range | None:
        """Takes so many places side by side, at the beginning or the end; None where there is no such gap."""
        ends = [0, *(taken.stop for taken in self._taken)]
        gaps = list(enumerate(zip(ends, [*(taken.start for taken in self._taken), self.size])))
        for at, (begin, end) in reversed(gaps) if from_end else gaps:
            if end - begin >= count:
                first = end - count if from_end else begin
                self._taken.insert(at, range(first, first + count))
                return self._taken[at]
        return None

    def free(self, extent: range) -> None:
        """Gives a range back."""
        self._taken.remove(extent)


def count_units(slots: int) -> int:
    """Counts the units that hold so many slots."""
    return -(-slots // UNIT)


def power_of_two(least: int) -> int:
    """Returns the smallest power of two that is not below `least`."""
    return 1 << max(least - 1, 0).bit_length()
