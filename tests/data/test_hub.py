"""Data sets of the hub, of which a directory stands in for one: the same code of `datasets` finds its files."""

import json

import datasets
import pytest

from spa_jax.data.hub import PARQUET, read_hub
from spa_jax.errors import UserError

ROWS = [
    {"question": "When?", "answer": "1999-05-04", "id": 7},
    {"question": "How old?", "answer": "007", "id": 8},
    {"question": "Who?", "answer": None, "id": 9},
]
COLUMNS = "source=question,target=answer"


@pytest.fixture
def hub(tmp_path):
    """A data set of two configurations, one in JSON and one in Parquet in two files."""
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "json" / "validation.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "json" / "test.csv").write_text("question,answer\nWhere?,here\n")
    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string")})
    for number, rows in enumerate((ROWS[:1], ROWS[1:])):
        part = datasets.Dataset.from_list([{key: row[key] for key in features} for row in rows], features)
        part.to_parquet(tmp_path / "parquet" / f"train-0000{number}-of-00002.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: json\n  data_files:\n"
        "  - {split: train, path: json/train.jsonl}\n  - {split: validation, path: json/validation.jsonl}\n"
        "- config_name: parquet\n  data_files: parquet/*\n"
        "- config_name: csv\n  data_files:\n  - {split: test, path: json/test.csv}\n---\n"
    )
    return tmp_path


def answers(pairs):
    return [(pair.source, pair.target) for pair in pairs]


@pytest.mark.parametrize("config", ["json", "parquet"])
def test_text_is_what_the_files_have_and_empty_rows_are_left_out(config, hub, caplog):
    train, held_out = read_hub(f"{hub}:{config}", COLUMNS)
    assert answers(train) == [("When?", "1999-05-04"), ("How old?", "007")]
    assert answers(held_out) == ([("When?", "1999-05-04")] if config == "json" else [])
    name, place = train[1].origin.rsplit(", ", 1)
    assert (name.endswith("train.jsonl"), place) == (config == "json", "line 2" if config == "json" else "row 1")
    (warning,) = caplog.messages
    assert warning.startswith("1 of 3 rows are left out, the first since ")
    assert "column 'target' is missing, empty or not text" in warning


def test_of_several_configurations_one_is_to_be_named(hub):
    with pytest.raises(UserError, match=r"cannot read .*json.*parquet.*write org/name:CONFIG if it has several"):
        read_hub(str(hub), COLUMNS)
    with pytest.raises(UserError, match=r"cannot read .* from the hub \(.*'other'.*"):
        read_hub(f"{hub}:other", COLUMNS)


@pytest.mark.parametrize("name", ["json", "csv:default", ":default", "squad"])
def test_what_is_neither_a_name_nor_a_directory_is_not_looked_for(name, hub, monkeypatch):
    """By the name `json`, a loader of `datasets`, whatever lies in the directory would be read."""
    monkeypatch.chdir(hub / "json")
    with pytest.raises(UserError, match=f"data.hub is '{name}': write org/name, org/name:CONFIG, or a directory"):
        read_hub(name, COLUMNS)
    monkeypatch.chdir(hub)
    assert len(read_hub("parquet", COLUMNS)[0]) == 2


def test_there_must_be_a_split_to_train_on(hub):
    with pytest.raises(UserError, match=r":csv' has no split 'train', but test: download it"):
        read_hub(f"{hub}:csv", COLUMNS)


def test_what_a_script_lays_out_is_read_from_the_hubs_conversion(hub, monkeypatch):
    asked = []

    def load(name, config, revision=None):
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found it.py")
        return original(name, config)

    original = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    assert answers(read_hub(f"{hub}:json", COLUMNS)[1]) == [("When?", "1999-05-04")]
    assert asked == [None, PARQUET]


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch):
    def load(*arguments):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(UserError, match=r"cannot read 'org/name' from the hub \(Couldn't reach .*\): check the name"):
        read_hub("org/name")
