"""Compiles the engine's programs before anybody needs them, by running each once on groups that have no slots."""

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from spa_jax.decoding.sampling import Sampling
from spa_jax.engine.calls import Calls
from spa_jax.engine.group import Group, Task
from spa_jax.engine.schedule import MAX_PART_TOKENS, MAX_ROWS, PART, part_length
from spa_jax.engine.slots import Slots
from spa_jax.models.block import PADDING
from spa_jax.models.llama import Llama

TAPS = 6
"""How many hidden states the device reads; another number compiles one small program more."""
NOWHERE = range(PADDING, PADDING)
"""The slots of a group whose keys and values are written nowhere."""


def programs(calls: Calls, slots: Slots, model: Llama, longest: int) -> list[Callable[[], object]]:
    """Lists calls that compile, of sampling and greedy choice, all programs for prompts and answers of up to `longest`
    tokens together. They change nothing of what the cache holds, which must be as large as it will ever be.

    Args:
        calls: runs them.
        slots: the cache.
        model: the backbone.
        longest: tokens.
    """
    config = model.config
    width, last = config.hidden_size, config.num_layers
    task = Task(
        kernel=np.zeros((width, 2), np.float32), offset=np.zeros(width, np.float32), threshold=0.0, routed=False,
        asks=True, adds=True, entry=last // 2, enters_at_head=False, taps=tuple(range(last // 2 + 1))[-TAPS:],
        attends=False, corrects_prompt=True, eos_ids=(), limit=2, sampling=Sampling(), seed=0, beams=None,
        keep=lambda taps: taps,
    )  # fmt: skip

    def groups(count: int, length: int, first: int) -> list[Group]:
        """Makes groups of prompts of so many tokens, the first ones of which have run."""
        found = []
        for _ in range(count):
            group = Group(task, 0, [0] * length, task.entry, NOWHERE)
            group.first, group.state = first, np.zeros((1, width), model.activation_dtype)
            found.append(group)
        return found

    def run_step(count: int, view: int) -> None:
        calls.run_steps(groups(count, view - 1, view - 1), 1, 0)

    def run_prompt(count: int, length: int, view: int, corrected: bool) -> None:
        chosen = groups(count, view, view - length)
        if not corrected:
            calls.run_prompts(chosen, 0)
            return
        for group in chosen:
            group.prompt_states = np.zeros((view, width), model.activation_dtype)
        calls.finish_prompts(chosen, 0)

    views = sorted({slots.view(length) for length in range(1, longest + 1)})
    lengths = sorted({part_length([length]) for length in range(1, PART + 1)})
    found: list[Callable[[], object]] = []
    for view in views:
        found += [functools.partial(run_step, count, view) for count in _powers(MAX_ROWS)]
        for length, corrected in itertools.product(lengths, (False, True)):
            counts = _powers(MAX_PART_TOKENS // length)
            found += [functools.partial(run_prompt, count, length, view, corrected) for count in counts]
    return found


def _powers(most: int) -> Iterator[int]:
    """Yields the powers of two that are not above `most`."""
    count = 1
    while count <= most:
        yield count
        count *= 2
