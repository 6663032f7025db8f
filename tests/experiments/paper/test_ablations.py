"""Ablations: rows that are trainings on single questions, measured teacher-forced."""

import pytest

from experiments.paper import ablations
from experiments.paper.scales import BUDGET, MINI, PAPER


def test_every_row_is_another_training_with_the_protocol_of_its_task():
    for task, protocol in MINI.ablations.items():
        trainings = [cell.training for cell in ablations.cells(MINI, task).values()]
        assert len({tuple(sorted(training.changes.items())) for training in trainings}) == len(trainings)
        for training in trainings:
            assert dict(training.changes).items() >= protocol.items()
            assert training.single_questions
            assert training.tuned_on is None
    assert ablations.cells(PAPER, "sciq") == {}


def test_rows_of_other_taps_or_kinds_keep_their_size_and_rows_of_other_widths_do_not():
    same_size = {row for row, cell in ablations.cells(MINI, "sciq").items() if cell.training.same_size}
    assert {"spa taps all", "spa taps last:1", "s3 transformer pruned"} <= same_size
    assert not same_size & {"spa E 16", "spa E 64", "spa seed 0", "s3"}


def test_a_row_is_measured_on_the_test_split_and_generates_nothing(tiny_store):
    cells = ablations.cells(tiny_store.scale, "sciq")
    routed, always = (tiny_store.result(cells[row]) for row in ("spa seed 0", "s3"))
    assert routed["loss/oracle"] <= min(routed["loss/plugin"], routed["loss/always"], routed[f"loss/at {BUDGET}"])
    assert 0 <= routed["oracle/usage"] <= 1
    assert always["loss/plugin"] == always["loss/always"]
    assert f"loss/at {BUDGET}" not in always
    assert routed["loss/base"] == pytest.approx(always["loss/base"])
    assert tiny_store.record(cells["s3"]) == always
    assert not (tiny_store.results / "predictions").exists()
    assert tiny_store.summary(cells["s3"].training)["epochs"] == 1
