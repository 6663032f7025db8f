"""The cache of all groups on the cloud's devices, which grows as they need it."""

from typing import Any

import jax

from spa_jax.data.padding import padded_length
from spa_jax.decoding.cache import cache_bytes, grow_shared_cache, init_shared_cache
from spa_jax.engine.extents import UNIT, Extents, power_of_two
from spa_jax.errors import UserError
from spa_jax.models.llama import Llama

FIRST_UNITS = 64
"""Units of the cache at first; it doubles when more are needed."""


class Slots:
    """A cache `{"k", "v"}` of `[L,S,K,H]` and who has which part of it.

    Attributes:
        cache: None before it is needed. Whoever runs a program that changes it puts the new one in its place.
        unit_bytes: memory of a unit.
    """

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._most: int | None = None
        self.cache: Any = None
        self.unit_bytes = cache_bytes(model.config, 1, UNIT, model.activation_dtype)
        self._extents = Extents(0)

    def bound(self, memory: int) -> None:
        """Lets the cache grow to so many bytes and no further.

        Raises:
            UserError: not even a unit fits.
        """
        self._most = memory // self.unit_bytes
        if not self._most:
            raise UserError(
                f"a memory of {memory} bytes is too little: {UNIT} tokens of this backbone have {self.unit_bytes}"
            )

    def grow(self) -> None:
        """Makes the cache as large as it may be, if that is bounded.

        Raises:
            UserError: it does not fit the device's memory.
        """
        if self._most is None or self._extents.size >= self._most:
            return
        try:
            self._grow(self._most)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            size = self._most * self.unit_bytes / 2**30
            raise UserError(f"a cache of {size:.1f} GiB does not fit this device: give less memory") from error

    @property
    def size(self) -> int:
        """S."""
        return UNIT * self._extents.size

    @property
    def taken(self) -> int:
        """Slots that somebody has."""
        return UNIT * self._extents.taken

    def view(self, slots: int) -> int:
        """Returns how many slots a call sees of each row, one of few numbers, to see at least so many."""
        return min(padded_length(slots, UNIT), self.size)

    def take(self, units: int) -> range | None:
        """Takes so many units side by side, as slots, and lets the cache grow for them; None where it may not."""
        while (taken := self._extents.take(units)) is None:
            size = max(FIRST_UNITS, 2 * self._extents.size, power_of_two(units))
            if self._most is not None:
                size = min(size, self._most)
            if size <= self._extents.size:
                return None
            self._grow(size)
        return _slots(taken)

    def take_free(self) -> range | None:
        """Takes a unit, as slots, away from those that `take` gives out; None where no one is free."""
        taken = self._extents.take(1, from_end=True)
        return taken and _slots(taken)

    def free(self, slots: range) -> None:
        """Gives back what was taken."""
        self._extents.free(range(slots.start // UNIT, slots.stop // UNIT))

    def reset(self) -> None:
        """Forgets everything, after a call that failed and may have lost the cache."""
        self._extents, self.cache = Extents(0), None

    def _grow(self, units: int) -> None:
        model, slots = self._model, UNIT * units
        if self.cache is None:
            self.cache = init_shared_cache(model.config, slots, model.activation_dtype, model.partitioner)
        else:
            self.cache = grow_shared_cache(self.cache, slots, model.partitioner)
        self._extents.size = units


def _slots(units: range) -> range:
    return range(UNIT * units.start, UNIT * units.stop)
