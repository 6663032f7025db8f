"""Errors of a device that gets no answer, or not all of it."""

from spa_jax.decoding.hypotheses import Generation
from spa_jax.errors import UserError


class Unfinished(UserError):
    """A generation that nobody can go on with; `generations` holds what was generated until then."""

    def __init__(self, message: str, generations: list[Generation]) -> None:
        super().__init__(message)
        self.generations = generations


class CloudGone(Unfinished):
    """The cloud cannot be reached any more."""


class SessionLost(Unfinished):
    """The cloud does not know the session any more: it stops, was started anew, or another one has taken its place."""


class Unserved(UserError):
    """A refusal for a reason that lies in the cloud or in who asks, and not in what was asked for."""


class Busy(Unserved):
    """The cloud has no room now."""


BY_KIND = {"refused": UserError, "overloaded": Busy}
"""Errors by the kinds of refusals."""
LOST = ("unknown-session", "stopping")
"""Kinds of refusals by which a session ends that has begun."""
