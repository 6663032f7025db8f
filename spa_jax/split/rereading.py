"""What is read from files, and again when they change, as long as a cloud runs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from spa_jax.errors import UserError

log = logging.getLogger(__name__)
Value = TypeVar("Value")


class Reread(Generic[Value]):
    """A value that is read from files.

    Attributes:
        value: the last one that could be read.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], Value]) -> None:
        """Reads it with a function of no arguments.

        Raises:
            UserError: of that function.
        """
        self._paths, self._read = paths, read
        self._seen = self._stamps()
        self.value = read()

    def refresh(self) -> bool:
        """Reads again what has changed; says whether there is a new value. Where it cannot be read, the old one holds,
        and the log says so, once for each change."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        try:
            self.value = self._read()
        except UserError as error:
            log.warning("%s; what was read before holds", error)
            return False
        log.info("read again: %s", ", ".join(self._paths))
        return True

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        """Returns what tells a file from a changed one: when it was written, its size and its inode."""
        return [_stamp(path) for path in self._paths]


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
