"""The four data sets: prompts, sizes that nest, and what is said about rows that are not theirs."""

import json
import os
from pathlib import Path

import datasets
import pytest

from spa_jax.data.pairs import Pair
from spa_jax.data.tasks import PARQUET, TASKS, load_split, nested_subset
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
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
    assert first.origin.endswith("test.jsonl', row 1")
    assert second.origin.endswith("test.jsonl', row 2")
    (pair,) = read(write(ROWS["coqa"]), "coqa")
    assert pair.later[0].origin.endswith("row 1, turn 2")


BAD = {
    "column": ([{"text": "a"}], "lacks column document, summary; columns are text"),
    "type": ([{"document": ["a"], "summary": "b"}], "not of the type it has on the hub"),
    "empty": ([ROWS["xsum"], {"document": "a", "summary": " "}], r"row 2: column 'summary' is empty"),
    "null": ([ROWS["xsum"], {"document": None, "summary": "b"}], r"row 2: column 'document' is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_of_something_else_are_refused_by_name(case, write):
    rows, says = BAD[case]
    with pytest.raises(UserError, match=says):
        read(write(*rows), "xsum")


@pytest.mark.parametrize(("content", "says"), [("", "has no rows"), ("{", "is no JSON lines file"), (None, "no file")])
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


@pytest.mark.parametrize("name", TASKS)
def test_real_rows_are_read(name):
    shared = Path(os.environ.get("SPA_JAX_SHARED") or Path(__file__).parents[3] / "shared") / "data"
    directory = shared / name.removesuffix("_closed_book")
    if not directory.is_dir():
        pytest.skip("the samples of the real data sets are not here")
    pairs = load_split(name, str(directory), "validation")
    assert sum(len(pair.turns) for pair in pairs) == {"xsum": 70, "cnn_dailymail": 70, "coqa": 568}.get(name, 124)
