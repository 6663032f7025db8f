"""The arguments of the engine's programs, from groups: always a power of two of them, the last one repeated as padding.

Shape letters as in `spa_jax.engine.programs`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from spa_jax.decoding.beam import searches
from spa_jax.decoding.sampling import Penalties, Sampling
from spa_jax.engine.extents import power_of_two
from spa_jax.engine.group import Group
from spa_jax.engine.programs import Parts, Places, Progress, Wishes
from spa_jax.engine.schedule import part_end, part_length
from spa_jax.models.block import PADDING


def places_of(groups: Sequence[Group], view: int, slots: int) -> Places:
    """Finds where groups are in a cache of so many slots, seen C at a time."""
    starts = [group.extent.start for group in groups]
    start = _array(np.int32, starts + [PADDING] * (power_of_two(len(groups)) - len(groups)))
    return Places(start, np.minimum(start, slots - view))


def wishes_of(groups: Sequence[Group], stops: int) -> Wishes:
    """Collects what groups ask for, at most so many stop tokens each."""
    groups = _repeat_last(groups)
    tasks = [group.task for group in groups]

    eos_ids = [[*task.eos_ids, *[-1] * (stops - len(task.eos_ids))] for task in tasks]
    temperature, top_k, top_p = zip(*(task.sampling for task in tasks))
    frequency, presence = zip(*(task.penalties for task in tasks))
    return Wishes(
        kernel=_array(np.float32, [task.kernel for task in tasks]),
        offset=_array(np.float32, [task.offset for task in tasks]),
        threshold=_array(np.float32, [task.threshold for task in tasks]),
        routed=_array(bool, [task.routed for task in tasks]),
        asks=_array(bool, [task.asks for task in tasks]),
        adds=_array(bool, [task.adds for task in tasks]),
        eos_ids=_array(np.int32, eos_ids),
        limit=_array(np.int32, [task.limit for task in tasks]),
        sampling=Sampling(_array(np.float32, temperature), _array(np.int32, top_k), _array(np.float32, top_p)),
        penalties=Penalties(_array(np.float32, frequency), _array(np.float32, presence)),
        scored=_array(bool, [task.scored for task in tasks]),
        seed=_array(np.int32, [task.seed for task in tasks]),
        number=_array(np.int32, [group.number for group in groups]),
        search=None if tasks[0].beams is None else searches([task.beams for task in tasks if task.beams]),
    )


def progress_of(groups: Sequence[Group], places: Places, view: int) -> Progress:
    """Collects how far groups are that are ready for a step."""
    every = _repeat_last(groups)
    no_g = np.zeros(groups[0].state.shape, np.float32)
    seen: Any = None
    said: Any = None
    if groups[0].task.beams is None:
        said = np.full((len(every), view), -1, np.int32)
        for row, group in zip(said, groups):
            row[: group.generated] = group.hypotheses[0].tokens
    if groups[0].seen is not None:
        seen = np.zeros((len(every), groups[0].task.columns, view), bool)
        for row, group, begin in zip(seen, groups, np.asarray(places.begin).tolist()):
            shift = group.extent.start - begin
            row[:, shift : shift + len(group.extent)] = group.seen[:, : view - shift]
    return Progress(
        length=_array(np.int32, [len(group.prompt) for group in every]),
        generated=_array(np.int32, [group.generated for group in every]),
        state=_array(groups[0].state.dtype, [group.state for group in every]),
        asked=_array(bool, [group.asked for group in every]),
        g=_array(np.float32, [no_g if group.g is None else group.g for group in every]),
        answered=_array(bool, [group.g is not None for group in every]),
        token=_array(np.int32, [group.token or 0 for group in every]),
        given=_array(bool, [group.token is not None for group in every]),
        said=said,
        scores=_array(np.float32, [group.scores for group in every]),
        finished_scores=_array(np.float32, [group.finished_scores for group in every]),
        seen=seen,
    )


def parts_of(groups: Sequence[Group], values: Sequence[Any]) -> tuple[Any, Parts]:
    """Collects the next part of each group's prompt.

    Args:
        groups: whose prompts have a next part.
        values: of every token of each prompt, arrays `[T,*]` or lists.

    Returns:
        The values of the parts `[G,M,*]`, and where these are.
    """
    length = part_length([len(group.prompt) - group.first for group in groups])
    parts = [np.asarray(each[group.first : part_end(group)]) for group, each in zip(groups, values)]
    padded = np.zeros((power_of_two(len(groups)), length, *parts[0].shape[1:]), parts[0].dtype)
    for row, part in zip(padded, parts):
        row[: len(part)] = part
    every = _repeat_last(groups)
    first = _array(np.int32, [group.first for group in every])
    return padded, Parts(first, _array(np.int32, [len(group.prompt) for group in every]))


def take(tree: Any, index: Any) -> Any:
    """Indexes every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _array(dtype: Any, values: Sequence[Any]) -> Any:
    """Makes an argument of a program, which becomes an array of its devices when that is called."""
    return np.array(values, dtype)


def _repeat_last(groups: Sequence[Group]) -> list[Group]:
    """Pads groups to a power of two."""
    return [*groups, *[groups[-1]] * (power_of_two(len(groups)) - len(groups))]
