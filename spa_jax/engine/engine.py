"""The cloud's engine: one batch for the groups of all sessions, which join and leave between its calls.

A group that waits for its device holds up nobody: every call gathers those that are ready. The engine knows neither
messages nor connections. What comes in is taken up by the next `turn`, which makes one call of a program.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from spa_jax.engine.calls import Calls
from spa_jax.engine.extents import count_units
from spa_jax.engine.group import Group, Phase, Task
from spa_jax.engine.prefixes import Prefixes
from spa_jax.engine.schedule import (
    MAX_ROWS,
    Pace,
    choose_parts,
    choose_rows,
    count_rows,
    count_steps,
    gather_until,
    hold_until,
    is_step_due,
)
from spa_jax.engine.slots import Slots
from spa_jax.engine.warm import programs
from spa_jax.errors import UserError
from spa_jax.weights.backbone import Backbone


class NoRoom(UserError):
    """The cache cannot hold a session now."""


@dataclasses.dataclass
class Tally:
    """Counts of what an engine has done so far.

    Attributes:
        prompt_seconds, prompt_tokens: of running prompts; tokens with padding.
        step_seconds, steps: of steps that add tokens.
        rows: hypotheses of all these steps.
    """

    prompt_seconds: float = 0.0
    prompt_tokens: int = 0
    step_seconds: float = 0.0
    steps: int = 0
    rows: int = 0


class Engine:
    """A backbone with one cache, and the groups that it runs.

    Attributes:
        slots: the cache.
        prefixes: what of it is kept for others that begin alike.
        pace: how long its calls take.
        tally: what it has done.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        model = backbone.model(tuple(range(backbone.config.num_layers + 1)))
        self.slots, self.pace, self.tally = Slots(model), Pace(), Tally()
        self.prefixes = Prefixes(self.slots, backbone.config.max_position_embeddings)
        self._model, self._calls = model, Calls(backbone, model, self.slots)
        self._groups: list[Group] = []
        self._clock = 0
        self._prompt_seconds = 0.0  # that groups which are ready have been held for prompts
        self._held_since: float | None = None
        self._added_at = 0.0  # when the newest group came, on `time.monotonic`'s clock

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self._backbone.config.vocab_size

    def warm(self, longest: int) -> Iterator[int]:
        """Compiles, one after another, the programs for prompts and answers of up to `longest` tokens together, and
        gives the cache all the memory it may have, since its size is compiled in. Beam search compiles when it is used.

        Yields:
            How many programs are left.

        Raises:
            UserError: the backbone takes fewer tokens, or the cache does not fit the device's memory.
        """
        most = self._backbone.config.max_position_embeddings
        if longest > most:
            raise UserError(f"programs for {longest} tokens cannot be compiled: the backbone takes at most {most}")
        self.slots.grow()
        self.prefixes.copy((), ())
        left = programs(self._calls, self.slots, self._model, longest)
        while left:
            yield len(left)
            self.slots.grow()  # a call that failed in between may have lost it
            left.pop()()

    def add(self, task: Task, prompts: Sequence[Sequence[int]], namespace: str | None = None) -> list[Group]:
        """Adds a group for each prompt of a session.

        Args:
            task: what the session asks for.
            prompts: token ids.
            namespace: of those with whom it shares what prompts begin with; None for nobody.

        Raises:
            NoRoom: the cache cannot hold them; none is added.
        """
        self.drop_finished()
        entry = task.entry
        if not task.asks and not task.offset.any() and self._groups:
            # Nothing enters: the session says the same at every entry, and joins the batch that has most groups.
            entry = Counter(group.entry for group in self._groups).most_common(1)[0][0]
        added: list[Group] = []
        for number, prompt in enumerate(prompts):
            extent = self._take(count_units(task.count_slots(len(prompt))))
            if extent is None:
                for group in added:
                    self.slots.free(group.extent)
                raise NoRoom("the cloud's memory is taken by other sessions: try again later")
            group = Group(task, number, prompt, entry, extent, namespace)
            group.since = self._clock
            added.append(group)
        self._groups += added
        self._added_at = time.monotonic()
        return added

    def _take(self, units: int) -> range | None:
        """Takes a part of the cache, in which prefixes make room."""
        while (extent := self.slots.take(units)) is None and self.prefixes.evict():
            pass
        return extent

    def go_on(self) -> bool:
        """Turns, if there is nothing that `hold` waits for; false where nothing is due."""
        return self.hold() > 0 or self.turn()

    def turn(self) -> bool:
        """Runs one call; false where nothing is due."""
        self.drop_finished()
        self._clock += 1
        self._held_since = None
        prompts, ready = self._due()
        began = time.perf_counter()
        if prompts and not (ready and is_step_due(ready, self._prompt_seconds, self.pace)):
            chosen = self._begin(prompts, bool(ready))
            run = self._calls.finish_prompts if chosen[0].is_opened else self._calls.run_prompts
            tokens = run(chosen, self._clock)
            seconds = time.perf_counter() - began
            self.pace.took_prompts(tokens, seconds)
            self.tally.prompt_seconds += seconds
            self.tally.prompt_tokens += tokens
            self._prompt_seconds += seconds if ready else 0
            for group in chosen:
                if group.phase is not Phase.PROMPT:
                    self.prefixes.keep(group, group.prompt[:-1])
        elif ready:
            rows = choose_rows(ready)
            most = count_steps(rows, self._waiting(), bool(prompts), time.monotonic(), self.pace)
            steps = self._calls.run_steps(rows, most, self._clock)
            seconds = time.perf_counter() - began
            if any(group.phase is not Phase.OVER for group in rows):  # a step that ends all of them runs no lower block
                self.pace.took_step(count_rows(rows), seconds / steps)
            self.tally.step_seconds += seconds
            self.tally.steps += steps
            self.tally.rows += steps * count_rows(rows)
            self._prompt_seconds = 0.0
        return bool(ready or prompts)

    def _begin(self, prompts: Sequence[Group], others_wait: bool) -> list[Group]:
        """Chooses prompts whose next parts run together, behind what others have run of them; among few, so that a turn
        is short however many there are."""
        prompts = sorted(prompts, key=lambda group: group.since)[:MAX_ROWS]
        prompts = self.prefixes.left_to_run(prompts)
        for group in prompts:
            self.prefixes.reuse(group)
        return choose_parts(prompts, self.pace.part_tokens(others_wait))

    def hold(self) -> float:
        """Returns for how many seconds to wait for answers or prompts before the next turn, since these are about to
        come."""
        (prompts, ready), now = self._due(), time.monotonic()
        if prompts:
            return 0.0 if ready else gather_until(prompts, self._added_at, self.pace) - now
        if not ready:
            return 0.0
        self._held_since = self._held_since or now
        return hold_until(ready, self._waiting(), now, self._held_since, self.pace) - now

    def _due(self) -> tuple[list[Group], list[Group]]:
        """Finds the groups whose prompts are to be run, and those that are ready for a step, a session's together."""
        groups = [group for group in self._groups if not group.is_left]
        prompts = [group for group in groups if group.phase is Phase.PROMPT]
        beginning = {id(group.task) for group in prompts}
        return prompts, [group for group in groups if group.phase is Phase.READY and id(group.task) not in beginning]

    def _waiting(self) -> list[Group]:
        return [group for group in self._groups if group.phase is Phase.WAITING and not group.is_left]

    def reset(self) -> None:
        """Forgets all groups, after a call that failed and may have lost the cache."""
        self._groups = []
        self.slots.reset()
        self.prefixes.reset()

    def drop_finished(self) -> None:
        """Frees the slots of groups that are over or left; every turn begins so."""
        for group in [group for group in self._groups if group.phase is Phase.OVER or group.is_left]:
            if group.shares_all and group.generated:
                self.prefixes.keep(group, [*group.prompt, *group.hypotheses[0].tokens[:-1]])
            if group.is_left:
                group.prompt_taps = []
            self.slots.free(group.extent)
            self._groups.remove(group)
