"""Entries of tables, as text and as means."""

from experiments.paper.report import TableEntry, entry, mean


def test_entries_say_ours_the_interval_and_the_papers():
    assert TableEntry(1.234, (1.0, 2.0), 3.5).text() == "1.23 [1.00, 2.00] (3.5)"
    assert TableEntry(None, None, 3.5).text() == "- (3.5)"
    assert TableEntry(2.0).text(1) == "2.0"


def test_an_entry_is_a_number_an_estimate_or_nothing():
    result = {"share": 0.5, "score": [1.0, 0.5, 2.0]}
    assert entry(result, "share", 40, factor=100) == (50, None, 40)
    assert entry(result, "score", 3.0) == (1.0, (0.5, 2.0), 3.0)
    assert entry(result, "other") == entry(None, "share") == (None, None, None)


def test_a_mean_waits_for_all_of_its_entries():
    assert mean([TableEntry(1.0), TableEntry(2.0)], 3.0) == (1.5, None, 3.0)
    assert mean([TableEntry(1.0), TableEntry(None)]) == mean([]) == (None, None, None)
