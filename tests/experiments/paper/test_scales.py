"""Scales by name, each with all that the tables ask of it."""

import pytest

from experiments.paper.scales import MINI, PAPER, SCALES, SIZES, TASKS, find_scale
from spa_jax.errors import UserError


def test_scales_are_found_by_name():
    assert find_scale("paper") is PAPER
    assert find_scale("mini") is MINI
    with pytest.raises(UserError, match="no scale 'huge'; scales are paper, mini"):
        find_scale("huge")


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_scale_has_every_size_of_every_task_and_of_the_tasks_it_names(scale):
    assert set(TASKS) <= scale.sizes.keys()
    assert all(tuple(sizes) == SIZES for sizes in scale.sizes.values())
    named = {*scale.transformer, *scale.table2, *scale.replacing, *scale.beside_lora, *scale.ablations}
    assert named <= scale.sizes.keys()
    if scale.short_tuned_on:
        task, size, _ = scale.short_tuned_on
        assert size in scale.sizes[task]
