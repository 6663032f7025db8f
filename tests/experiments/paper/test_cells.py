"""Descriptions of trainings and cells: what shares a training, and labels that no two different ones share."""

from experiments.paper import run, tables
from experiments.paper.cells import (
    cell_of,
    inner_training,
    one_shot,
    plugin_training,
    short_training,
    size_training,
    spa_cell,
    transformer_training,
)
from experiments.paper.scales import MINI, PAPER, SCALES


def test_no_two_cells_or_trainings_that_differ_share_a_label():
    for scale in SCALES.values():
        cells = run.all_cells(scale)
        trainings = {cell.training for cell in cells if cell.training}
        trainings |= {training.tuned_on for training in trainings if training.tuned_on}
        assert len({cell.label for cell in cells}) == len(cells)
        described = {(training.label, training.tuned_on is None): training for training in trainings}
        assert len(described) == len(trainings)


def test_labels_are_those_of_the_kept_results():
    assert one_shot("xsum").label == "xsum-base-one-shot"
    assert cell_of(plugin_training(MINI, "xsum"), "s1").label == "xsum-full-spa-as-s1"
    assert cell_of(plugin_training(MINI, "sciq", offset=True), budget=0.62).label == "sciq-full-spa-offset-at-0.62"
    assert cell_of(plugin_training(MINI, "sciq", "s2", epochs=4), "s3").label == "sciq-full-s2-4epochs-as-s3"
    assert short_training(MINI, "xsum", "spa").label == "xsum-full-spa-short-3epochs"


def test_settings_that_share_a_side_network_share_a_training():
    for scale in (MINI, PAPER):
        three = tables.settings(scale, "xsum")
        assert three["S1"].training == three["SPA"].training == spa_cell(scale, "xsum").training
        assert three["S2"].training == three["S3"].training == tables.methods(scale, "xsum")["LST"].training


def test_only_the_whole_spa_measures_the_effect_of_table_4():
    assert spa_cell(MINI, "sciq").changes == {"effect": True}
    assert spa_cell(MINI, "sciq", "small").changes == {}


def test_a_training_is_what_it_changes():
    assert plugin_training(MINI, "xsum", size="small", epochs=4, offset=True).changes == {
        "setting": "spa", "data.size": "60", "router.offset": True, "train.epochs": 4,
    }  # fmt: skip
    beside, lora = short_training(MINI, "xsum", "spa"), short_training(MINI, "xsum", "lora")
    common = {"data.size": "full", "train.epochs": 3, "data.max_length": 256}
    assert beside.changes == {"setting": "spa", **common}
    assert lora.changes == {"setting": "lora", **common, "peft.remat": "dots", "train.eval_every": 40}
    assert (lora.same_size, beside.same_size) == (True, False)
    assert transformer_training(MINI, "sciq").same_size


def test_a_size_is_of_the_best_plugin_and_where_it_is_the_whole_it_is_that_training():
    small, whole = size_training(MINI, "xsum", "small"), inner_training(MINI, "xsum", "spa")
    assert small.label == "xsum-small-spa-inner-more"
    assert small.changes == {**whole.changes, "data.size": "132", "train.epochs": 22}
    assert (small.more_rows, whole.more_rows) == (True, False)
    assert size_training(MINI, "coqa", "full") == inner_training(MINI, "coqa", "spa")
    assert size_training(MINI, "coqa", "medium").label == "coqa-medium-spa-inner"
    for task in ("xsum", "sciq"):
        assert size_training(PAPER, task, "full") == inner_training(PAPER, task, "spa")


def test_a_record_says_that_there_are_more_rows_only_where_there_are():
    assert size_training(MINI, "sciq", "full").description["more_rows"] is True
    assert "more_rows" not in inner_training(MINI, "sciq", "spa").description


def test_the_learning_rate_is_chosen_on_the_medium_size_without_an_offset():
    medium = plugin_training(MINI, "sciq", size="medium").tuned_on
    assert plugin_training(MINI, "sciq", epochs=1).tuned_on == medium
    assert plugin_training(MINI, "sciq", offset=True).tuned_on == medium
    assert medium.changes == {"setting": "spa", "data.size": "250"}
    on = short_training(MINI, "xsum", "lora").tuned_on
    assert (on.task, on.changes["data.size"], on.changes["train.epochs"]) == ("sciq", "60", 12)
    on = short_training(PAPER, "coqa", "lora").tuned_on
    assert (on.task, on.changes["data.size"], on.changes["train.epochs"]) == ("coqa", "medium", 15)
