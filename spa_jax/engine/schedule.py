"""What the engine runs next, as pure functions of what waits and of how long calls take."""

import math
from collections.abc import Sequence

from spa_jax.engine.extents import power_of_two
from spa_jax.engine.group import Group
from spa_jax.engine.programs import MAX_STEPS

MAX_ROWS = 32
"""Most hypotheses in one step."""
PART = 64
"""Most tokens of one prompt in one call."""
MAX_PART_TOKENS = 512
"""Most tokens of all prompts in one call."""
STEP_SECONDS, PROMPT_SECONDS, ONLY_PROMPT_SECONDS = 0.25, 0.5, 1.0
"""About the longest that a call may take, so that nothing waits long to join or to leave; a call of prompts may take
longer where nobody is ready for a step."""
GATHERING = 0.05
"""The part of the time that prompts will take for which they are held, since more of them may be about to come."""
LATE = 3.0
"""For how many times as long as usual an answer is waited for."""
FRESH_SECONDS = 1.0
"""About the longest that groups without a token are held while other prompts run."""


class Pace:
    """How long calls take: the lesser of the last two of a kind, since one that compiles a program says nothing."""

    def __init__(self) -> None:
        self._steps: dict[int, list[float]] = {}
        self._per_token: list[float] = []

    def took_step(self, rows: int, seconds: float) -> None:
        """Takes note of a step of so many rows."""
        kept = self._steps.setdefault(power_of_two(rows), [])
        kept[:] = [*kept[-1:], seconds]

    def took_prompts(self, tokens: int, seconds: float) -> None:
        """Takes note of a call that ran so many tokens of prompts, padding included."""
        self._per_token = [*self._per_token[-1:], seconds / tokens]

    def step(self, rows: int) -> float:
        """Estimates the seconds of a step of so many rows, by the nearest number that was measured."""
        if not self._steps:
            return STEP_SECONDS
        rows = power_of_two(rows)
        return min(self._steps[min(self._steps, key=lambda known: (abs(math.log2(known / rows)), -known))])

    def prompts(self, tokens: int) -> float:
        """Estimates the seconds of running so many tokens of prompts; 0 where nothing is known."""
        return tokens * min(self._per_token, default=0.0)

    def part_tokens(self, others_wait: bool) -> int:
        """Estimates how many tokens of prompts a call may run, where others wait for a step or not."""
        if not self._per_token:
            return PART
        seconds = PROMPT_SECONDS if others_wait else ONLY_PROMPT_SECONDS
        return int(min(max(seconds / min(self._per_token), PART), MAX_PART_TOKENS))


def part_length(lengths: Sequence[int]) -> int:
    """Computes to how many tokens the next parts of prompts are padded, of which so many are left of each."""
    return max(power_of_two(min(max(lengths), PART)), PART // 4)


def part_end(group: Group) -> int:
    """Returns where the next part of a group's prompt ends."""
    return min(group.first + PART, len(group.prompt))


def choose_parts(prompts: Sequence[Group], most_tokens: int) -> list[Group]:
    """Chooses prompts whose next parts run in one call: the one that waits longest, and others that fit beside it."""
    first, *others = sorted(prompts, key=lambda group: group.since)
    chosen = [first]
    for group in others:
        if (group.entry, group.task.corrects_prompt, group.is_opened) != (
            first.entry, first.task.corrects_prompt, first.is_opened,
        ):  # fmt: skip
            continue
        length = part_length([len(each.prompt) - each.first for each in [*chosen, group]])
        if length * power_of_two(len(chosen) + 1) <= most_tokens:
            chosen.append(group)
    return chosen


def gather_until(prompts: Sequence[Group], newest: float, pace: Pace) -> float:
    """Computes until when to hold prompts that would run alone, of which the newest came at that time: as long as a
    call is not full, and more may be about to come."""
    tokens = sum(part_end(group) - group.first for group in prompts)
    return newest if tokens >= pace.part_tokens(others_wait=False) else newest + GATHERING * pace.prompts(tokens)


def choose_rows(ready: Sequence[Group]) -> list[Group]:
    """Chooses groups that take a step together: the one that waits longest, and others of its kind."""
    first = min(ready, key=lambda group: group.since)
    alike = sorted((group for group in ready if _kind(group) == _kind(first)), key=lambda group: group.since)
    return alike[: max(MAX_ROWS // first.task.columns, 1)]


def _kind(group: Group) -> tuple[int, int, bool]:
    """Returns what the groups of a step have in common."""
    return group.entry, group.task.columns, group.task.beams is None


def count_rows(groups: Sequence[Group]) -> int:
    """Counts the hypotheses of groups."""
    return sum(group.task.columns for group in groups)


def is_step_due(ready: Sequence[Group], prompt_seconds: float, pace: Pace) -> bool:
    """Says whether groups that are ready for a step come before prompts, which have run for so long meanwhile.

    Prompts take as long as a step between two steps. Groups without a token lose less by being held, and take their
    steps with the others then.
    """
    is_fresh = all(group.generated == 0 for group in ready)
    return prompt_seconds >= (FRESH_SECONDS if is_fresh else pace.step(count_rows(ready)))


def count_steps(rows: Sequence[Group], waiting: Sequence[Group], has_prompts: bool, now: float, pace: Pace) -> int:
    """Computes how many steps one call may take: as many as it may last, and until others are about to be answered; one
    where prompts wait, or the taps of every token are kept."""
    if has_prompts or any(group.keeps_all_taps for group in rows):
        return 1
    until_due = (
        group.usual_wait - (now - group.waits_since)
        for group in waiting
        if now - group.waits_since < LATE * group.usual_wait
    )
    seconds = min([STEP_SECONDS, *until_due])
    return min(max(int(seconds / pace.step(count_rows(rows))), 1), MAX_STEPS)


def hold_until(ready: Sequence[Group], waiting: Sequence[Group], now: float, since: float, pace: Pace) -> float:
    """Computes until when to hold groups that are ready, since others are about to be answered.

    Two steps take longer than one of as many rows together. Groups are held as long as that is worth: at most for the
    time that it saves. A group that has never been answered is expected to take as long as the quickest of the others.

    Args:
        ready: groups that could take a step.
        waiting: groups that wait for an answer.
        now, since: the time, and when they began to be held, on `time.monotonic`'s clock.
        pace: how long steps take.
    """
    rows, until, joining = choose_rows(ready), now, 0
    quickest = min(group.usual_wait for group in [*ready, *waiting])
    usual = {group: group.usual_wait if math.isfinite(group.usual_wait) else quickest for group in waiting}
    alike = [
        group for group in waiting if _kind(group) == _kind(rows[0]) and now - group.waits_since < LATE * usual[group]
    ]
    for group in sorted(alike, key=lambda group: group.waits_since + usual[group]):
        joining += group.task.columns
        together = count_rows(rows) + joining
        saved = pace.step(count_rows(rows)) + pace.step(joining) - pace.step(together)
        if together <= MAX_ROWS and max(group.waits_since + usual[group], now) - since <= saved:
            until = max(until, min(group.waits_since + LATE * usual[group], since + saved))
    return until
