"""The search for the best plugin: which candidates go on, and what is written of them."""

import json

import pytest

from experiments.paper import search
from experiments.paper.scales import MINI


def test_no_two_trainings_share_a_file_even_where_case_does_not_count():
    labels = [training.label.lower() for training in search.trainings(MINI)]
    assert len(set(labels)) == len(labels)


def test_the_candidates_with_the_least_loss_go_on(store, keep_record):
    """Losses fall with the name's place in the table, so that the last ones are the best."""
    names = list(search.CANDIDATES)
    first, second = search.STAGES
    for place, name in enumerate(names):
        record = {"loss/base": 4.0, "loss/always": 3 - place / 10, "loss/spa": 3.0, "loss/s1": 3.0, "router/usage": 0.5}
        for stage in (first, second):
            for task in stage.tasks:
                training = search.candidate(store.scale, task, name, stage)
                if stage is first or place >= len(names) - first.keep:
                    keep_record(store, "trainings", training.label, {"description": training.description, **record})
    store.may_run = False
    search.report(store)
    ranked, left = (json.loads((store.results / f"search_{i}.json").read_text())["rows"] for i in (1, 2))
    assert list(ranked) == names[::-1]
    assert list(left) == names[: -1 - first.keep : -1]
    best = left[names[-1]]["mean share left"]["ours"]
    assert best == pytest.approx((3 - (len(names) - 1) / 10) / 4)
    assert not (store.results / "search_3.json").exists()
