"""Rows of single questions: which ones, and what stands in them."""

import json

import pytest

from experiments.paper.single_questions import write_splits
from spa_jax.errors import UserError


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(directory, rows):
    directory.mkdir()
    for split in ("train", "validation", "test"):
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_a_story_the_first_a_middle_and_the_last_question_are_taken(tmp_path):
    questions = [f"Q{i}?" for i in range(5)]
    whole = {"story": "A story.", "questions": questions, "answers": {"input_text": ["0", "1", "2", "3", "4"]}}
    no_middle = {**whole, "answers": {"input_text": ["0", "1", " ", "3", "4"]}}
    one = {"story": "Short.", "questions": ["Who?"], "answers": {"input_text": ["I."]}}
    write(tmp_path / "coqa", [whole, no_middle, one])
    write_splits("coqa", str(tmp_path / "coqa"), tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "test.jsonl")
    assert [row["target"] for row in rows] == ["0", "2", "4", "0", "4", "I."]
    assert rows[1]["source"] == "Answer in a few words: Q2?\n\nAsked before:\nQ0? 0\nQ1? 1\n\nA story."


def test_of_sciq_every_question_is_taken_with_its_passage(tmp_path):
    row = {"question": "What?", "correct_answer": "this", "support": "It is this."}
    write(tmp_path / "sciq", [row])
    write_splits("sciq", str(tmp_path / "sciq"), tmp_path / "out")
    for split in ("train", "validation", "test"):
        (found,) = rows_of(tmp_path / "out" / f"{split}.jsonl")
        assert found == {"source": "Answer in a few words: What?\n\nIt is this.", "target": "this"}


def test_a_directory_must_be_named_and_be_there(tmp_path):
    with pytest.raises(UserError, match="name a directory with coqa's rows by --data=DIR"):
        write_splits("coqa", "", tmp_path)
    with pytest.raises(UserError, match=r"cannot read the data file '.*train\.jsonl'"):
        write_splits("coqa", str(tmp_path / "none"), tmp_path)
