"""Calls of the engine's programs: what groups are is gathered, and what came of it is handed out."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from spa_jax.engine.batch import parts_of, places_of, progress_of, take, wishes_of
from spa_jax.engine.extents import power_of_two
from spa_jax.engine.group import Group, Phase
from spa_jax.engine.programs import finish_prompts, pick_taps, run_prompts, run_steps
from spa_jax.engine.schedule import part_end
from spa_jax.engine.slots import Slots
from spa_jax.models.llama import Llama
from spa_jax.weights.backbone import Backbone


class Calls:
    """A backbone and its cache, which run groups."""

    def __init__(self, backbone: Backbone, model: Llama, slots: Slots) -> None:
        self._backbone, self._model, self._slots = backbone, model, slots
        self._stops = len(backbone.eos_ids) + 1  # and the one of a plugin's template

    def run_prompts(self, groups: Sequence[Group], clock: int) -> int:
        """Runs the next parts of some prompts, up to the entry and further.

        Returns:
            The tokens of the call, padding included.
        """
        first, ends = groups[0], [part_end(group) for group in groups]
        places, wishes, view = self._gather(groups, ends)
        tokens, parts = parts_of(groups, [group.prompt for group in groups])
        entry = np.int32(first.entry)
        last = entry if first.task.corrects_prompt else np.int32(self._backbone.config.num_layers)
        self._slots.cache, states, newest, asked, probability, taps = run_prompts(
            self._model, self._backbone.params, self._slots.cache, tokens.astype(np.int32), parts, wishes, places,
            entry, last, view=view,
        )  # fmt: skip
        length, wanted = tokens.shape[1], []
        for at, (group, end) in enumerate(zip(groups, ends)):
            if group.reads_prompt:
                wanted.append((group, at * length + np.arange(end - group.first)))
            elif group.task.asks and end == len(group.prompt):
                wanted.append((group, at * length + np.array([end - 1 - group.first])))
        picked = dict(zip((id(group) for group, _ in wanted), self._pick(taps, wanted)))
        corrected = np.asarray(states) if first.task.corrects_prompt else None
        state, is_asked, p_consult = jax.device_get((newest, asked, probability))
        for at, (group, end) in enumerate(zip(groups, ends)):
            kept = picked.get(id(group))
            if group.reads_prompt:
                group.prompt_taps.append(kept)
            if corrected is not None:
                group.prompt_states.append(corrected[at, : end - group.first])
            group.first = end
            if end < len(group.prompt):
                group.since = clock
                continue
            if group.reads_prompt:
                group.prompt_taps = jax.tree.map(lambda *leaves: np.concatenate(leaves), *group.prompt_taps)
            if kept is not None:
                group.keep_newest(take(kept, [-1] * group.task.columns))
            group.end_prompt(state[at], bool(is_asked[at]), float(p_consult[at]), clock)
        return tokens.size

    def finish_prompts(self, groups: Sequence[Group], clock: int) -> int:
        """Runs the next parts of prompts that were to be corrected from the entry on; returns as `run_prompts`."""
        ends = [part_end(group) for group in groups]
        places, wishes, view = self._gather(groups, ends)
        states, parts = parts_of(groups, [group.prompt_states for group in groups])
        no_g = np.zeros(states.shape[2:], np.float32)
        every = (
            np.broadcast_to(no_g, each.prompt_states.shape) if each.prompt_g is None else each.prompt_g
            for each in groups
        )
        g, _ = parts_of(groups, list(every))
        answered = np.zeros(len(states), bool)
        answered[: len(groups)] = [group.prompt_g is not None for group in groups]
        self._slots.cache = finish_prompts(
            self._model, self._backbone.params, self._slots.cache, states, g, answered, parts, wishes, places,
            np.int32(groups[0].entry), view=view,
        )  # fmt: skip
        jax.block_until_ready(self._slots.cache)  # so that the time of the call is known
        for group, end in zip(groups, ends):
            group.first, group.since = end, clock
            if end == len(group.prompt):
                group.end_opening()
        return states.shape[0] * states.shape[1]

    def run_steps(self, groups: Sequence[Group], most: int, clock: int) -> int:
        """Adds up to `most` tokens to groups of one kind; returns how many."""
        columns = groups[0].task.columns
        new = (min(group.generated + most, group.task.limit) for group in groups)
        places, wishes, view = self._gather(groups, [len(group.prompt) + n * columns for group, n in zip(groups, new)])
        self._slots.cache, steps, taps = run_steps(
            self._model, self._backbone.params, self._slots.cache, wishes, places, progress_of(groups, places, view),
            np.int32(groups[0].entry), np.int32(most), view=view,
        )  # fmt: skip
        done: Any = jax.device_get(steps)
        for at, group in enumerate(groups):
            for step in range(done.num_steps):
                if done.ranking is None:
                    is_last = bool(done.is_done[at] and step + 1 == done.num_steps)
                    group.extend(int(done.tokens[step, at, 0]), float(done.logprobs[step, at]), is_last)
                else:
                    group.search(take(done.ranking, (step, at)))
                group.probability = done.probability[step, at]
            group.state = done.state[at]
        going = [at for at, group in enumerate(groups) if group.phase is not Phase.OVER]
        read = [at for at in going if done.asked[at].any() or groups[at].keeps_all_taps]
        picked = self._pick(taps, [(groups[at], at * columns + np.arange(columns)) for at in read])
        for at, kept in zip(read, picked):
            groups[at].keep_newest(kept)
        for at in going:
            groups[at].settle(done.asked[at], clock)
        return int(done.num_steps)

    def _gather(self, groups: Sequence[Group], slots: Sequence[int]) -> tuple[Any, Any, int]:
        """Finds where groups are that see so many slots each, what they ask for, and how much of the cache is seen."""
        view = self._slots.view(max(slots))
        return places_of(groups, view, self._slots.size), wishes_of(groups, self._stops), view

    def _pick(self, taps: jax.Array, wanted: Sequence[tuple[Group, np.ndarray]]) -> list[Any]:
        """Fetches each group's taps of the tokens `[M]` that it wants, as `[M,P,D]` that are kept."""
        pairs = [
            np.stack(np.meshgrid(tokens, group.task.taps, indexing="ij"), axis=-1).reshape(-1, 2)
            for group, tokens in wanted
        ]
        if not pairs:
            return []
        every = np.concatenate(pairs).astype(np.int32)
        padded = np.zeros((power_of_two(max(len(every), 16)), 2), np.int32)
        padded[: len(every)] = every
        picked = pick_taps(self._model, self._backbone.params, taps, padded[:, 1], padded[:, 0])
        parts = np.split(np.asarray(picked, np.float32)[: len(every)], np.cumsum([len(part) for part in pairs])[:-1])
        return [
            group.task.keep(part.reshape(len(tokens), len(group.task.taps), -1))
            for (group, tokens), part in zip(wanted, parts)
        ]
