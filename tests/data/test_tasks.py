"""The four data sets: prompts, sizes that nest, and what is said about rows that are not theirs."""

import json
import os
from pathlib import Path

import datasets
import pytest

from spa_jax.data.hub import PARQUET
from spa_jax.data.pairs import Pair
from spa_jax.data.tasks import TASKS, load_split, nested_subset
from spa_jax.errors import UserError

ROWS = {
    "xsum": {"document": "It rained.\nAll day.", "summary": "Rain.", "id": "7"},
    "cnn_dailymail": {"article": "It rained.", "highlights": "Rain .\nMore rain .", "id": "8"},
    "sciq": {
        "question": "What falls?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "rain",
        "support": "Rain falls.",
    },
    "coqa": {
        "source": "mctest", "story": "Ann has a cat.", "questions": ["Who?", "What has she?"], "id": "9",
        "answers": {"input_text": ["Ann", "a cat"], "answer_start": [0, 8], "answer_end": [3, 13]},
        "additional_answers": [["Ann", "she"], ["cat", "one cat"]],
    },
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="test"):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        )
        return str(tmp_path)

    return write


def read(directory, name, split="test"):
    return load_split(name, directory, split)


def test_summaries(write):
    (pair,) = read(write(ROWS["xsum"]), "xsum")
    assert (pair.source, pair.target) == ("Summarize this article in one sentence.\n\nIt rained.\nAll day.", "Rain.")
    (pair,) = read(write(ROWS["cnn_dailymail"]), "cnn_dailymail")
    assert pair.source.endswith("\n\nIt rained.")
    assert pair.target == "Rain .\nMore rain ."


def test_science_questions_with_and_without_their_passage(write):
    directory = write(ROWS["sciq"], {**ROWS["sciq"], "support": ""})
    sources = [pair.source for pair in read(directory, "sciq")]
    assert sources == ["Answer in a few words: What falls?\n\nRain falls.", "Answer in a few words: What falls?"]
    assert {pair.source for pair in read(directory, "sciq_closed_book")} == {sources[1]}
    assert {pair.target for pair in read(directory, "sciq")} == {"rain"}


def test_a_column_that_is_empty_in_every_row_is_still_text(write):
    (pair,) = read(write({**ROWS["sciq"], "support": None}), "sciq")
    assert pair.source == "Answer in a few words: What falls?"


def test_the_closed_book_may_have_a_training_file_of_its_own(write):
    write(ROWS["sciq"], name="train")
    directory = write(ROWS["sciq"], ROWS["sciq"], name="train_closed_book")
    assert [len(read(directory, name, "train")) for name in ("sciq", "sciq_closed_book")] == [1, 2]


def test_conversations_have_every_answer_and_the_other_peoples(write):
    (pair,) = read(write(ROWS["coqa"]), "coqa")
    assert pair.source == "Answer in a few words: Who?\n\nAnn has a cat."
    assert [turn.source for turn in pair.later] == ["What has she?"]
    assert [turn.target for turn in pair.turns] == ["Ann", "a cat"]
    assert [turn.references for turn in pair.turns] == [("Ann", "she"), ("cat", "one cat")]
    without = {name: column for name, column in ROWS["coqa"].items() if name != "additional_answers"}
    (pair,) = read(write(without), "coqa")
    assert [turn.references for turn in pair.turns] == [(), ()]


def test_rows_are_named(write):
    first, second = read(write(ROWS["sciq"], ROWS["sciq"]), "sciq")
    assert first.origin.endswith("test.jsonl, line 1")
    assert second.origin.endswith("test.jsonl, line 2")
    (pair,) = read(write(ROWS["coqa"]), "coqa")
    assert pair.later[0].origin.endswith("line 1, turn 2")


AS_WRITTEN = {
    "a word and a number": ['"a"', "42"],
    "numbers": ["42", "4.50", "-1e-7", "9" * 5000],
    "dates": ['"1999-05-04"', '"1999-05-05"'],
    "times": ['"1999-05-04T10:00:00Z"', '"1999-05-04T10:00:00Z"'],
    "truth values": ["true", "false"],
    "JSON": ['"{\\"a\\": 1}"', '"[1]"', '"null"'],
}


@pytest.mark.parametrize("case", AS_WRITTEN)
def test_text_is_what_the_file_has_whatever_it_looks_like(case, write):
    """An answer's text does not depend on the other rows."""
    rows = [f'{{"question": {value}, "correct_answer": {value}}}' for value in AS_WRITTEN[case]]
    written = [json.loads(value) if value[0] == '"' else value for value in AS_WRITTEN[case]]
    pairs = read(write(*rows), "sciq")
    assert [pair.target for pair in pairs] == written
    assert [pair.source.removeprefix("Answer in a few words: ") for pair in pairs] == written


def test_nulls_are_nobodys_answers(write):
    rows = [{**ROWS["coqa"], "additional_answers": others} for others in ([["x", None], None], [None, ["y"]], None, [])]
    found = [[turn.references for turn in pair.turns] for pair in read(write(*rows), "coqa")]
    assert found == [[("x",), ()], [(), ("y",)], [(), ()], [(), ()]]


@pytest.mark.parametrize("bad", [None, "", " "])
def test_rows_with_an_empty_column_are_left_out_and_named(bad, write, caplog):
    """One of a hundred thousand is no reason to refuse the others."""
    without = {"document": "no summary"}
    pairs = read(write(ROWS["xsum"], {**ROWS["xsum"], "summary": bad}, without, ROWS["xsum"]), "xsum")
    assert [pair.origin.rpartition(", ")[2] for pair in pairs] == ["line 1", "line 4"]
    (warning,) = caplog.messages
    assert warning.startswith("2 of 4 rows are left out, the first since ")
    assert warning.endswith("test.jsonl, line 2: column 'summary' is empty")


def test_a_row_may_stand_on_several_lines_of_an_array(tmp_path):
    rows = [ROWS["sciq"], {**ROWS["sciq"], "correct_answer": 42}]
    (tmp_path / "test.jsonl").write_text(json.dumps(rows, indent=2))
    pairs = read(str(tmp_path), "sciq")
    assert [pair.target for pair in pairs] == ["rain", "42"]
    assert pairs[1].origin.endswith("test.jsonl, row 2")


COQA = ROWS["coqa"]
BAD = {
    "column": ("xsum", {"text": "a"}, "lacks column document, summary; columns are text"),
    "no columns": ("xsum", {}, "lacks column document, summary; columns are none"),
    "type": ("xsum", {"document": ["a"], "summary": "b"}, "line 2: column 'document' is not of the type it has"),
    "no list": ("coqa", {**COQA, "questions": "Who?"}, "line 2: column 'questions' is not of the type"),
    "no fields": ("coqa", {**COQA, "answers": ["Ann"]}, "line 2: column 'answers.input_text' is not of the type"),
    "optional": ("coqa", {**COQA, "additional_answers": {"0": []}}, "line 2: column 'additional_answers' is not of"),
    "empty": ("xsum", {"document": "a", "summary": " "}, "not empty: .*line 2: column 'summary' is empty"),
    "fewer answers": ("coqa", {**COQA, "answers": {"input_text": ["Ann"]}}, "line 2: there are 2 questions, 1 answers"),
    "fewer others": ("coqa", {**COQA, "additional_answers": [["x"]]}, "2 answers and 1 lists of additional"),
    "no object": ("xsum", "3", r"line 2 is not a JSON object"),
    "surrogate": ("xsum", {"document": "a\ud83d", "summary": "b"}, "'document' is not text: character 2"),
    "in a list": ("coqa", {**COQA, "questions": ["a", "\udfff"]}, "line 2: column 'questions' is not text"),
    "nested": ("xsum", '{"id": ' + "[" * 100_000, "line 2 has JSON that is nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_of_something_else_are_refused_by_name(case, write):
    task, row, says = BAD[case]
    with pytest.raises(UserError, match=says):
        read(write("", row), task)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "has no rows"), ("\n \n", "has no rows"), ("{", "line 1 is not JSON"), (None, "no file")],
)
def test_missing_empty_and_broken_files_are_refused(content, says, tmp_path):
    if content is not None:
        (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        read(str(tmp_path), "xsum")


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no task 'squad'; tasks are xsum, cnn_dailymail, coqa, sciq"):
        load_split("squad", "", "test")


def test_an_unreachable_hub_is_one_message(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot read 'EdinburghNLP/xsum' from the hub .*name a directory"):
        load_split("xsum", "", "test")


def test_a_data_set_laid_out_by_a_script_is_read_from_the_hubs_conversion(monkeypatch):
    asked = []

    def load(*which, split, revision=None):
        asked.append((*which, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        return datasets.Dataset.from_list([ROWS["xsum"]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [pair.target for pair in load_split("xsum", "", "test")] == ["Rain."]
    assert asked == [("EdinburghNLP/xsum", None, "test", None), ("EdinburghNLP/xsum", None, "test", PARQUET)]


def test_coqa_is_tested_on_its_validation_and_chosen_on_a_part_of_train(monkeypatch):
    rows = datasets.Dataset.from_list([ROWS["coqa"]])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *which, split: asked.append(split) or rows)
    for split in ("train", "validation", "test"):
        load_split("coqa", "", split)
    assert asked == ["train[:95%]", "train[95%:]", "validation"]


def some(count):
    return [Pair(str(i), "x") for i in range(count)]


def test_a_smaller_size_is_part_of_every_larger_one():
    pairs = some(50)
    chosen = [nested_subset(pairs, size) for size in ("10", 25, "full")]
    assert [len(part) for part in chosen] == [10, 25, 50]
    assert chosen[1][:10] == chosen[0]
    assert chosen[2][:25] == chosen[1]
    assert chosen[2] != pairs
    assert set(chosen[2]) == set(pairs)


def test_sizes_count_the_questions_of_conversations():
    talks = [Pair(str(i), "x", later=(Pair("y", "z"), Pair("z", "y"))) for i in range(10)]
    assert [len(nested_subset(talks, size)) for size in (1, 3, 4, 9, 30)] == [1, 1, 2, 3, 10]


def test_table_5s_sizes_have_names():
    assert len(nested_subset(some(5_001), "small", "sciq")) == 5_000
    sizes = {name: (task.sizes["small"], task.sizes["medium"], task.paper_full) for name, task in TASKS.items()}
    assert sizes["xsum"] == (10_000, 100_000, 227_000)
    assert sizes["cnn_dailymail"] == (20_000, 150_000, 312_000)
    assert sizes["coqa"] == (4_000, 40_000, 127_000)
    assert sizes["sciq"] == (5_000, 10_000, 13_679)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("51", "asks for 51 questions, but the data has 50"),
        ("small", "asks for 10,000 questions"),
        ("tiny", "write a number, small, medium, full"),
        ("0", "write a number"),
        ("-3", "write a number"),
    ],
)
def test_an_unknown_or_too_large_size_is_refused(size, says):
    with pytest.raises(UserError, match=says):
        nested_subset(some(50), size, "xsum")


def test_the_hubs_rows_are_read_as_the_same_types(monkeypatch):
    rows = datasets.Dataset.from_list([COQA, {**COQA, "story": " "}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *which, split: rows)
    (pair,) = load_split("coqa", "", "test")
    assert [(turn.target, turn.references) for turn in pair.turns] == [
        ("Ann", ("Ann", "she")),
        ("a cat", ("cat", "one cat")),
    ]
    assert pair.origin == "stanfordnlp/coqa (validation), row 1"
    numbers = datasets.Dataset.from_list([{"question": "How many?", "correct_answer": 42}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *which, split: numbers)
    assert [pair.target for pair in load_split("sciq", "", "test")] == ["42"]


@pytest.mark.parametrize("name", TASKS)
def test_real_rows_are_read(name):
    shared = Path(os.environ.get("SPA_JAX_SHARED") or Path(__file__).parents[3] / "shared") / "data"
    directory = shared / name.removesuffix("_closed_book")
    if not directory.is_dir():
        pytest.skip("the samples of the real data sets are not here")
    pairs = load_split(name, str(directory), "validation")
    assert sum(len(pair.turns) for pair in pairs) == {"xsum": 70, "cnn_dailymail": 70, "coqa": 568}.get(name, 124)
