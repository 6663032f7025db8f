"""Which cells are run, how long they will take, and how often the backbone was needed."""

import itertools

import pytest

from experiments.paper import run
from experiments.paper.cells import Cell, cell_of, one_shot, plugin_training, short_training
from experiments.paper.scales import MINI
from spa_jax.errors import UserError


def test_cells_are_each_done_once_and_those_of_a_task_together():
    cells = run.all_cells(MINI)
    assert len(set(cells)) == len(cells)
    tasks = [cell.task for cell in cells]
    assert sum(a != b for a, b in itertools.pairwise(tasks)) == len(set(tasks)) - 1


def test_cells_are_selected_by_a_regular_expression():
    cells = [Cell("xsum-base", "xsum", None), cell_of(plugin_training(MINI, "xsum")), one_shot("sciq")]
    labels = [cell.label for cell in run.select(cells, "xsum-(?!full)|one-shot$")]
    assert labels == ["xsum-base", "sciq-base-one-shot"]
    assert run.select(cells, "") == cells
    with pytest.raises(UserError, match=r"--only='\*' is no regular expression: nothing to repeat"):
        run.select(cells, "*")


def test_the_time_that_is_left_is_judged_by_what_was_measured_of_the_same_kind(store, keep_record):
    full = plugin_training(MINI, "sciq")
    todo = [cell_of(full), cell_of(full, "s1"), Cell("xsum-base", "xsum", None)]
    assert run.estimate(store, todo) is None

    def keep(folder, of, **measured):
        keep_record(store, folder, of.label, {"description": of.description, **measured})

    keep("cells", Cell("sciq-base", "sciq", None), **{"time/evaluate_seconds": 10})
    keep("cells", one_shot("xsum"), **{"time/evaluate_seconds": 100})
    keep("trainings", plugin_training(MINI, "sciq", "s2"), **{"time/train_seconds": 7})
    keep("trainings", plugin_training(MINI, "sciq", "s2", "medium"), **{"time/train_seconds": 2})
    evaluations = 10 + 10 + 100
    assert run.estimate(store, todo) == 7 + 3 * 2 + evaluations  # three runs choose the learning rate
    keep_record(store, "rates", full.tuned_on.label, {"held_out_loss": {"0.001": 1.0}})
    assert run.estimate(store, todo) == 7 + evaluations


def test_backbone_passes_are_counted_once_a_run_and_without_those_that_train_through(store, keep_record):
    """The run at the chosen learning rate has two records."""
    full, lora = plugin_training(MINI, "sciq"), short_training(MINI, "sciq", "lora")
    summary = {"epochs": 15, "data/train_examples": 100, "data/held_out_examples": 10, "data/backbone_passes": 110}
    for label, training in ((full.label, full), (f"{full.label}-0.0005", full), (lora.label, lora)):
        run_name = f"{training.label}-0.0005"
        keep_record(store, "trainings", label, {"run": run_name, "description": training.description, **summary})
    assert run.backbone_passes(store) == {"needed": 1500 + 170, "run": 110, "saved": 1560}
