"""Who may begin a generation at a cloud: as many as there is room for, and the others in turn."""

import asyncio
import dataclasses
import math
import time
from collections import Counter
from collections.abc import AsyncIterator

from spa_jax.errors import UserError

COST_OF_NEW = 2
"""What a new token costs where one of a prompt costs 1."""
TOLD_EVERY = 1.0
"""Seconds after which a device is told its place in the queue again."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that devices may use of a cloud.

    Attributes:
        sessions: running generations of all devices.
        sessions_per_token: running generations of one device token.
        memory: bytes of all running sessions, and of the cache, in which what is free keeps prefixes.
        deadline: seconds a device has for an answer.
        first_deadline: seconds for its first answer about a prompt and its first about a new token, if that is longer:
            a device compiles its programs then.
        linger: seconds a finished session is kept for a device that lost its connection; at most `sessions` are.
        open_seconds: seconds a stream may take to send its first message.
        queue: generations that may wait for room.
        queue_seconds: how long each may wait.
        abandoned: seconds after which a generation ends that no device is attached to.
    """

    sessions: int = 64
    sessions_per_token: int = 8
    memory: int = 4 * 2**30
    deadline: float = 1.0
    first_deadline: float = 10.0
    linger: float = 30.0
    open_seconds: float = 10.0
    queue: int = 256
    queue_seconds: float = 60.0
    abandoned: float = 30.0

    def check(self) -> "Limits":
        """Refuses values out of range, and returns itself.

        Raises:
            UserError: a limit is not above 0 (`linger`, `first_deadline` and `queue`: below 0); the message names it.
        """
        for name, value in dataclasses.asdict(self).items():
            may_be_zero = name in ("linger", "first_deadline", "queue")
            if not (value > 0 or (value == 0 and may_be_zero)):
                raise UserError(f"{name} is {value}, but must {'not be below' if may_be_zero else 'be above'} 0")
        return self


class Refused(UserError):
    """A refusal of another kind than a request that makes no sense."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclasses.dataclass(eq=False)
class Applicant:
    """A generation that wants to begin, or has begun.

    Attributes:
        owner: whom it counts for.
        memory: bytes that it takes.
        cost: of its prompts and of all tokens that it may generate.
        decided: set when it may begin, or is refused.
        refusal: why it is.
    """

    owner: str
    memory: int
    cost: float
    decided: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    refusal: str = ""


class Admission:
    """A bounded queue in front of a cloud.

    Next comes the owner that was served least so far (a virtual token counter); one that comes back after a while has
    no more credit than those who have been there. Nobody is overtaken for taking more memory.
    """

    def __init__(self, limits: Limits, has_tokens: bool) -> None:
        """Bounds the sessions of an owner where devices have tokens."""
        self._limits, self._has_tokens = limits, has_tokens
        self._waiting: list[Applicant] = []
        self._inside: list[Applicant] = []
        self._served: dict[str, float] = {}
        self._is_closed = False

    @property
    def waiting(self) -> int:
        """Generations in the queue."""
        return len(self._waiting)

    def join(self, owner: str, memory: int, cost: float) -> Applicant:
        """Adds a generation to the queue; it may begin at once if there is room.

        Raises:
            UserError: no generation may take so much memory.
            Refused: the queue is full, and nobody has more in it than this owner.
        """
        if memory > self._limits.memory:
            raise UserError(
                f"this generation takes {memory / 2**20:.0f} MiB, and the cloud has {self._limits.memory / 2**20:.0f}: "
                "ask for fewer new tokens, prompts or beams"
            )
        if owner not in self._active():
            self._served[owner] = max(self._served.get(owner, 0.0), self._least_served(default=0.0))
        applicant = Applicant(owner, memory, cost)
        self._waiting.append(applicant)
        self._admit()
        if self._is_closed:
            self._refuse(applicant, self._obstacle(applicant))
        elif len(self._waiting) > self._limits.queue:
            counts = Counter(each.owner for each in self._waiting)
            greediest = max(counts, key=lambda each: (counts[each], each == owner))
            newest = next(each for each in reversed(self._waiting) if each.owner == greediest)
            self._refuse(newest, self._obstacle(newest) or "others wait longer")
        if applicant.refusal:
            raise Refused("overloaded", applicant.refusal)
        return applicant

    async def places(self, applicant: Applicant) -> AsyncIterator[int]:
        """Yields its place in the queue, 1 for the next, at least every second until it may begin.

        Raises:
            Refused: it has waited too long, is one too many, or the cloud stops.
        """
        began = time.monotonic()
        while not applicant.decided.is_set():
            yield self._in_order().index(applicant) + 1
            left = began + self._limits.queue_seconds - time.monotonic()
            try:
                async with asyncio.timeout(min(TOLD_EVERY, max(left, 0))):
                    await applicant.decided.wait()
            except TimeoutError:
                if left <= 0 and not applicant.decided.is_set():
                    self._refuse(applicant, f"there was no room within {self._limits.queue_seconds:g} s")
        if applicant.refusal:
            raise Refused("overloaded", applicant.refusal)

    def put_back(self, applicant: Applicant) -> bool:
        """Lets one wait on that was to begin, since the cache has no gap for it, until another one leaves; false if
        there is no other, or the cloud stops."""
        self._inside.remove(applicant)
        self._served[applicant.owner] -= applicant.cost
        self._waiting.insert(0, applicant)
        applicant.decided.clear()
        return bool(self._inside) and not self._is_closed

    def leave(self, applicant: Applicant, unused: float = 0.0) -> None:
        """Takes one out of the queue, or gives back its room and what of its cost was not used; others may begin."""
        if applicant in self._waiting:
            self._waiting.remove(applicant)
        elif applicant in self._inside:
            self._inside.remove(applicant)
            self._served[applicant.owner] -= unused
        active, least = self._active(), self._least_served(default=math.inf)
        self._served = {owner: cost for owner, cost in self._served.items() if owner in active or cost > least}
        self._admit()

    def close(self) -> None:
        """Refuses those who wait and all who come."""
        self._is_closed = True
        for applicant in list(self._waiting):
            self._refuse(applicant, self._obstacle(applicant))

    def _active(self) -> set[str]:
        return {each.owner for each in (*self._waiting, *self._inside)}

    def _least_served(self, default: float) -> float:
        """Computes what the least served owner had been served before those of its generations that are under way."""
        before = {owner: self._served[owner] for owner in self._active()}
        for applicant in self._inside:
            before[applicant.owner] -= applicant.cost
        return min(before.values(), default=default)

    def _refuse(self, applicant: Applicant, reason: str) -> None:
        self._waiting.remove(applicant)
        applicant.refusal = f"{reason}: try again later"
        applicant.decided.set()

    def _in_order(self) -> list[Applicant]:
        """Sorts those who wait by what their owners would have been served by then."""
        ahead: dict[str, float] = dict(self._served)
        keys = {}
        for applicant in self._waiting:
            keys[applicant] = ahead[applicant.owner]
            ahead[applicant.owner] += applicant.cost
        return sorted(self._waiting, key=lambda each: keys[each])

    def _admit(self) -> None:
        """Lets begin whoever has room."""
        for applicant in self._in_order():
            obstacle = self._obstacle(applicant)
            if not obstacle:
                self._waiting.remove(applicant)
                self._inside.append(applicant)
                self._served[applicant.owner] += applicant.cost
                applicant.decided.set()
            elif not self._is_at_its_limit(applicant.owner):
                return

    def _is_at_its_limit(self, owner: str) -> bool:
        count = sum(each.owner == owner for each in self._inside)
        return self._has_tokens and count >= self._limits.sessions_per_token

    def _obstacle(self, applicant: Applicant) -> str:
        """Says why one may not begin now; nothing if it may."""
        if self._is_closed:
            return "the cloud stops"
        if len(self._inside) >= self._limits.sessions:
            return "the cloud has as many sessions as it can take"
        if self._is_at_its_limit(applicant.owner):
            return f"this device token has {self._limits.sessions_per_token} sessions under way"
        if applicant.memory + sum(each.memory for each in self._inside) > self._limits.memory:
            return "the cloud's memory is taken by other sessions"
        return ""
