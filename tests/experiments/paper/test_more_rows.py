"""Rows of the data-size ablation: files that follow each other, and white space."""

import json

import pytest

from experiments.paper.more_rows import write_splits
from spa_jax.data.tasks import load_split
from spa_jax.errors import UserError


def write(directory, **files):
    directory.mkdir()
    for name, rows in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def article(text, summary):
    return {"document": text, "summary": summary, "id": "1"}


def test_more_rows_follow_and_the_white_space_of_articles_is_one_space(tmp_path):
    first, held_out = article("A.\nB.", "One."), article("E.", "Three.")
    write(tmp_path / "xsum", train=[first], train_more=[article("C.  D.\n", "Two.\nMore.")],
          validation=[held_out], test=[held_out], test_more=[first])  # fmt: skip
    write_splits("xsum", tmp_path / "xsum", tmp_path / "out")
    train, validation, test = (load_split("xsum", str(tmp_path / "out"), s) for s in ("train", "validation", "test"))
    head = "Summarize this article in one sentence.\n\n"
    said = [(pair.source.removeprefix(head), pair.target) for pair in train]
    assert said == [("A. B.", "One."), ("C. D.", "Two.\nMore.")]
    assert [pair.target for pair in validation] == ["Three."]
    assert [pair.target for pair in test] == ["Three.", "One."]


def test_rows_are_those_of_the_task_where_there_are_no_more(tmp_path):
    row = {"question": "What  is it?", "correct_answer": "this", "support": "It\nis."}
    write(tmp_path / "sciq", train=[row], validation=[row], test=[row])
    write_splits("sciq", tmp_path / "sciq", tmp_path / "out")
    for split in ("train", "validation", "test"):
        (before,), (after,) = (load_split("sciq", str(tmp_path / name), split) for name in ("sciq", "out"))
        assert (after.source, after.target) == (before.source, before.target)


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the data file '.*train\.jsonl'"):
        write_splits("xsum", tmp_path, tmp_path / "out")
