"""Where a run's rows come from, what bounds their length, and what is said of them."""

import json

import pytest

from spa_jax.data.pairs import Pair
from spa_jax.decoding.encoders import task_encoder
from spa_jax.errors import UserError
from spa_jax.training.config import DataConfig
from spa_jax.training.rows import load_pairs
from spa_jax.weights.huggingface import load_directory

CONTEXT = "the backbone's context of 128 tokens; only the first source is ever cut: shorten the rest"


@pytest.mark.parametrize(
    ("max_length", "limit", "says"),
    [
        (4000, 128, CONTEXT),
        (0, 128, CONTEXT),
        (128, 128, CONTEXT),
        (127, 127, "max_length=127; only the first source is ever cut: shorten the rest or raise max_length"),
    ],
)
def test_a_row_is_bounded_by_the_backbones_context_which_no_key_raises(
    max_length, limit, says, tiny_backbone_directory
):
    encoder = task_encoder(load_directory(tiny_backbone_directory), "plain", "", max_length, limited_by="max_length")
    assert encoder.max_length == limit
    with pytest.raises(UserError, match=f"more than {says}$"):
        encoder.encode(Pair("a", "b" * 200))
    (example,), cut = encoder.encode_all([Pair("a" * 200, "b")])
    assert cut == 1
    assert len(example.tokens) == limit


@pytest.fixture
def directory(tmp_path):
    """A data set as the hub has it, whose training rows ask a question twice."""
    for split, rows in {"train": "abcdefghia", "validation": "xa"}.items():
        lines = [json.dumps({"q": row, "a": "1"}) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


COLUMNS = "source=q,target=a"
PLACES = {
    "hub": lambda directory: DataConfig(hub=str(directory), columns=COLUMNS),
    "files": lambda directory: DataConfig(
        train=f"{directory}/train.jsonl", eval=f"{directory}/validation.jsonl", columns=COLUMNS
    ),
    "hub and file": lambda directory: DataConfig(
        hub=str(directory), eval=f"{directory}/validation.jsonl", columns=COLUMNS
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_own_rows_may_be_anywhere_and_those_that_are_held_out_but_trained_on_are_warned_of(place, directory, caplog):
    train, held_out = load_pairs(PLACES[place](directory), 0)
    assert "".join(pair.source for pair in train) == "abcdefghia"
    assert "".join(pair.source for pair in held_out) == "xa"
    (warning,) = [message for message in caplog.messages if "held-out" in message]
    assert warning.startswith("of 2 held-out rows, 1 ask the same as a training row (")


def test_without_a_validation_split_a_part_of_the_training_rows_is_held_out(directory):
    (directory / "validation.jsonl").unlink()
    train, held_out = load_pairs(DataConfig(hub=str(directory), columns=COLUMNS), 0)
    assert (len(train), len(held_out)) == (9, 1)


EXCLUSIVE = {
    "hub and train": ({"hub": "org/name", "train": "rows.jsonl"}, r"data\.hub takes the place of data\.train"),
    "hub and task": ({"hub": "org/name", "task": "sciq"}, r"data\.task brings its own rows: .* data\.hub"),
    "columns alone": ({"columns": COLUMNS}, r"data\.columns is set but data\.train is not"),
}


@pytest.mark.parametrize("case", EXCLUSIVE)
def test_keys_that_exclude_each_other_are_refused(case):
    keys, message = EXCLUSIVE[case]
    with pytest.raises(UserError, match=message):
        load_pairs(DataConfig(**keys), 0)
