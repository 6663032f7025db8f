"""Which devices a cloud knows: their tokens, read again when the file changes, and addresses that guess at them."""

import hmac
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Hashable

from spa_jax.split.grpc_channel import ServerSecurity
from spa_jax.split.rereading import Reread

log = logging.getLogger(__name__)
FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0
"""Seconds that a token waits before it is looked at, from an address that has sent one wrong one, and at most."""
FORGIVEN_AFTER = 300.0
"""Seconds without a wrong token after which those of an address are forgotten."""
MAX_KEPT = 4096
"""Addresses, and pairs of an address and a token, that are kept."""


class DeviceTokens:
    """The tokens of the devices that are served."""

    def __init__(self, security: ServerSecurity) -> None:
        """Reads them.

        Raises:
            UserError: the file cannot be used.
        """
        self._file = Reread([security.tokens], security.device_tokens) if security.tokens else None

    @property
    def has_any(self) -> bool:
        """Whether devices need tokens."""
        return self._file is not None

    def refresh(self) -> bool:
        """Reads the file again if it has changed; says whether there are other tokens now."""
        return self._file is not None and self._file.refresh()

    def knows(self, token: str) -> bool:
        """Compares with every token to the end, so that the time it takes tells nothing about them."""
        if self._file is None:
            return True
        given = token.encode(errors="replace")
        return sum(hmac.compare_digest(given, known.encode()) for known in self._file.value or ()) > 0


class Guesses:
    """Counts wrong tokens by the address they come from, from where the next one waits before it is looked at.

    A token that was right at its address does not wait, so that others behind the same address do not slow it down.
    """

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._right: OrderedDict[tuple[str, str], None] = OrderedDict()

    def wait(self, address: str, token: str) -> float:
        """Returns for how many seconds a token from this address must wait."""
        count, last = self._wrong.get(address, (0, -math.inf))
        if not count or time.monotonic() - last > FORGIVEN_AFTER or (address, token) in self._right:
            return 0.0
        return min(FIRST_WAIT * 2.0 ** min(count - 1, 60), LONGEST_WAIT)

    def add(self, address: str, token: str, is_right: bool) -> None:
        """Takes note of a token; the log tells of the first wrong one of an address, the second, the fourth, and so
        on."""
        if is_right:
            _keep(self._right, (address, token), None)
            return
        count, last = self._wrong.get(address, (0, -math.inf))
        count = count + 1 if time.monotonic() - last <= FORGIVEN_AFTER else 1
        _keep(self._wrong, address, (count, time.monotonic()))
        if count & (count - 1) == 0:
            log.warning("%d wrong device tokens from %s", count, address)


def _keep(kept: OrderedDict, key: Hashable, value: object) -> None:
    """Keeps a value, and forgets the oldest one where there are too many."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > MAX_KEPT:
        kept.popitem(last=False)
