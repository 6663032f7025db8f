"""Scales by name, each with all that the tables ask of it."""

import pytest

from experiments.paper.scales import MINI, PAPER, SCALES, SIZES, TASKS, find_scale
from spa_jax.errors import UserError


def test_scales_are_found_by_name():
    assert find_scale("paper") is PAPER
    assert find_scale("mini") is MINI
    with pytest.raises(UserError, match="no scale 'huge'; scales are paper, mini"):
        find_scale("huge")


PAPER_ROWS = {
    "xsum": (10, 100, 227), "cnn_dailymail": (20, 150, 312), "coqa": (4, 40, 127), "sciq": (5, 10, 13.679),
}  # fmt: skip
"""Table 5 of the paper, in thousands."""
LARGEST = {"xsum": 3000, "cnn_dailymail": 2512, "coqa": 4221, "sciq": 3000}


@pytest.mark.parametrize("task", TASKS)
def test_sizes_are_in_the_papers_ratios_and_as_many_rows_are_seen_of_each_as_fit_into_those_of_full(task):
    """Of CoQA sizes are answers, which stand in 9, 85 and 265 stories, and the rows seen are stories."""
    sizes, epochs = zip(*(MINI.by_size[task][size] for size in SIZES))
    numbers = [LARGEST[task] if size == "full" else int(size) for size in sizes]
    assert numbers == [round(LARGEST[task] * rows / PAPER_ROWS[task][-1]) for rows in PAPER_ROWS[task]]
    rows = (9, 85, 265) if task == "coqa" else numbers
    seen = rows[-1] * epochs[-1]
    assert seen <= 3000
    assert list(epochs) == [seen // each for each in rows]
    assert PAPER.by_size[task] == {"small": ("small", 15), "medium": ("medium", 15), "full": ("full", 15)}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_scale_has_every_size_of_every_task_and_of_the_tasks_it_names(scale):
    assert set(TASKS) <= scale.sizes.keys()
    assert all(tuple(sizes) == SIZES for sizes in scale.sizes.values())
    assert set(scale.by_size) == set(TASKS)
    assert all(tuple(sizes) == SIZES for sizes in scale.by_size.values())
    named = {
        *scale.more_rows,
        *scale.transformer,
        *scale.table2,
        *scale.replacing,
        *scale.beside_lora,
        *scale.ablations,
    }
    assert named <= scale.sizes.keys()
    if scale.short_tuned_on:
        task, size, _ = scale.short_tuned_on
        assert size in scale.sizes[task]
