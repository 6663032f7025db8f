"""The paper's four data sets: where their rows come from, and how a row becomes prompt and target (section 4.1).

A task's rows come from the Hugging Face hub, or from a directory with `train.jsonl`, `validation.jsonl` and
`test.jsonl` that have the hub's columns. A column is read as the type that its task declares. A source begins with the
question, so that what is cut from a long one is the end of its passage.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spa_jax.data.hub import from_hub
from spa_jax.data.pairs import Pair
from spa_jax.data.row_files import Rows, read_rows, warn_of_left_out
from spa_jax.data.text import check_text
from spa_jax.errors import UserError

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set as the paper uses it.

    Attributes:
        hub: name on the hub, and name of the configuration.
        columns: the columns that are read, with their type: `string`, or a list of a type. `a.b` is field b of
            column a.
        pair: makes a row a source and a target, or a conversation.
        max_length: most tokens of prompt and target together.
        new_tokens: most tokens to generate, which every prompt leaves free for its target.
        scores: how generations are scored, see `spa_jax.scoring.scores`.
        sizes: numbers of training questions in Table 5, by name; `full` is the whole train split.
        paper_full: the number that the paper counts as full, all splits together.
        optional: columns that are read if they exist, with their type.
        splits: our name of a split -> its name on the hub, where they differ.
        train_file: name of the training file in a directory, without `.jsonl`.
    """

    hub: tuple[str, str | None]
    columns: Mapping[str, Any]
    pair: Callable[[Row], Pair]
    max_length: int
    new_tokens: int
    scores: Literal["rouge", "answers"]
    sizes: Mapping[str, int]
    paper_full: int
    optional: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    train_file: str = "train"


def _summary(instruction: str, source: str, target: str) -> Callable[[Row], Pair]:
    return lambda row: Pair(f"{instruction}\n\n{row[source]}", row[target])


def _coqa(row: Row) -> Pair:
    """Makes a conversation about a story, every answer a target; the story follows the first question.

    Raises:
        ValueError: there are not as many answers, or lists of additional ones, as questions.
    """
    questions, answers = row["questions"], row["answers.input_text"]
    others = row["additional_answers"] or [()] * len(questions)
    if not len(questions) == len(answers) == len(others):
        raise ValueError(
            f"there are {len(questions)} questions, {len(answers)} answers and {len(others)} lists of additional "
            "answers, where every question has one of each"
        )
    turns = [
        Pair(question, answer, references=tuple(other for other in more or () if other is not None))
        for question, answer, more in zip(questions, answers, others)
    ]
    first = f"Answer in a few words: {turns[0].source}\n\n{row['story']}"
    return dataclasses.replace(turns[0], source=first, later=tuple(turns[1:]))


def _sciq_closed_book(row: Row) -> Pair:
    return Pair(f"Answer in a few words: {row['question']}", row["correct_answer"])


def _sciq(row: Row) -> Pair:
    """Makes a question followed by its passage, which some rows lack."""
    pair, passage = _sciq_closed_book(row), (row["support"] or "").strip()
    return dataclasses.replace(pair, source=f"{pair.source}\n\n{passage}") if passage else pair


_SCIQ: dict[str, Any] = {
    "hub": ("allenai/sciq", None),
    "columns": {"question": "string", "correct_answer": "string"},
    "new_tokens": 24,
    "scores": "answers",
    "sizes": {"small": 5_000, "medium": 10_000},
    "paper_full": 13_679,
}

TASKS = {
    "xsum": Task(
        hub=("EdinburghNLP/xsum", None),
        columns={"document": "string", "summary": "string"},
        pair=_summary("Summarize this article in one sentence.", "document", "summary"),
        max_length=640,
        new_tokens=64,
        scores="rouge",
        sizes={"small": 10_000, "medium": 100_000},
        paper_full=227_000,
    ),
    "cnn_dailymail": Task(
        hub=("abisee/cnn_dailymail", "3.0.0"),
        columns={"article": "string", "highlights": "string"},
        pair=_summary("List the highlights of this article in a few short sentences.", "article", "highlights"),
        max_length=896,
        new_tokens=128,
        scores="rouge",
        sizes={"small": 20_000, "medium": 150_000},
        paper_full=312_000,
    ),
    "coqa": Task(
        hub=("stanfordnlp/coqa", None),
        columns={"story": "string", "questions": ["string"], "answers.input_text": ["string"]},
        optional={"additional_answers": [["string"]]},
        pair=_coqa,
        max_length=1024,
        new_tokens=32,
        scores="answers",
        sizes={"small": 4_000, "medium": 40_000},
        paper_full=127_000,
        splits={"train": "train[:95%]", "validation": "train[95%:]", "test": "validation"},  # the hub has no test
    ),
    "sciq": Task(pair=_sciq, optional={"support": "string"}, max_length=384, **_SCIQ),
    "sciq_closed_book": Task(pair=_sciq_closed_book, max_length=160, train_file="train_closed_book", **_SCIQ),
}
"""Tasks by name. Sizes count questions, of which a row of CoQA has several."""


def find_task(name: str) -> Task:
    """Looks up a task by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TASKS:
        raise UserError(f"there is no task '{name}'; tasks are {', '.join(TASKS)}")
    return TASKS[name]


def load_split(name: str, directory: str, split: Split) -> list[Pair]:
    """Reads a task's split, in the order of the file or the hub.

    A row of which a column is empty is left out, with a warning.

    Args:
        name: name of the task.
        directory: directory that has the splits as JSON lines; empty for the hub.
        split: `train`, `validation` or `test`.

    Raises:
        UserError: the hub or a file cannot be read, a column is missing or of another type in some row, or no row is
            left.
    """
    task = find_task(name)
    where, rows = _open_directory(task, Path(directory), split) if directory else _open_hub(task, split)
    kinds = {**task.columns, **task.optional}
    pairs: list[Pair] = []
    empty: list[str] = []
    known: dict[str, None] = {}
    for origin, row in rows:
        known.update(dict.fromkeys(row))
        columns = {column: _value(row, column, kind, origin) for column, kind in kinds.items()}
        unfilled = [column for column in task.columns if not _is_filled(columns[column])]
        if unfilled:
            empty.append(f"{origin}: column '{unfilled[0]}' is empty")
        else:
            pairs.append(_pair(task, columns, origin))
    missing = sorted(column for column in task.columns if column.partition(".")[0] not in known)
    if empty and missing:
        raise UserError(f"{where} lacks column {', '.join(missing)}; columns are {', '.join(known) or 'none'}")
    if not pairs:
        raise UserError(f"{where} has no rows" + (f" that are not empty: {empty[0]}" if empty else ""))
    warn_of_left_out(empty, len(pairs))
    return pairs


def nested_subset(pairs: Sequence[Pair], size: str | int, name: str = "") -> list[Pair]:
    """Takes the first rows of one fixed shuffle, so that a smaller subset is part of every larger one.

    Args:
        pairs: all rows.
        size: the number of questions (a conversation counts each of its own), `full`, or a name of Table 5.
        name: name of the task whose sizes Table 5 lists.

    Raises:
        UserError: more questions than there are, or an unknown size.
    """
    questions = [len(pair.turns) for pair in pairs]
    wanted = _size(size, name, sum(questions))
    order = np.random.default_rng(0).permutation(len(pairs))
    reached = np.cumsum(np.array(questions)[order])
    if wanted > reached[-1]:
        raise UserError(f"data.size={size} asks for {wanted:,} questions, but the data has {reached[-1]:,}")
    return [pairs[row] for row in order[: int(np.searchsorted(reached, wanted)) + 1]]


def _size(size: str | int, name: str, everything: int) -> int:
    if size == "full":
        return everything
    sizes = TASKS[name].sizes if name in TASKS else {}
    if size in sizes:
        return sizes[str(size)]
    if str(size).isdecimal() and int(size) > 0:
        return int(size)
    raise UserError(f"data.size is '{size}': write a number, {', '.join([*sizes, 'full'])}")


def _open_directory(task: Task, directory: Path, split: Split) -> tuple[str, Rows]:
    named = directory / f"{task.train_file if split == 'train' else split}.jsonl"
    path = named if os.path.isfile(named) else directory / f"{split}.jsonl"
    if not os.path.isfile(path):
        raise UserError(f"there is no file '{path}': a task's directory has train, validation and test.jsonl")
    return f"'{path}'", read_rows(str(path))


def _open_hub(task: Task, split: Split) -> tuple[str, Rows]:
    import datasets

    hub, config = task.hub
    wanted = task.splits.get(split, split)
    advice = "name a directory with its rows as JSON lines instead"
    rows = from_hub(datasets.load_dataset, hub, config, advice, split=wanted)
    where = f"{hub} ({wanted})"
    return where, ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))


def _value(row: Row, column: str, kind: Any, origin: str) -> Any:
    """Returns a row's value of a column, as its type; None where it has none."""
    value: Any = row
    try:
        for field in column.split("."):
            if not isinstance(value, Mapping | None):
                raise TypeError(f"a {type(value).__name__} without fields")
            value = None if value is None else value.get(field)
        return _typed(value, kind, f"{origin}: column '{column}'")
    except TypeError as error:
        raise UserError(f"{origin}: column '{column}' is not of the type it has on the hub: {error}") from error


def _typed(value: Any, kind: Any, where: str) -> Any:
    """Returns a value as a type, a number or truth value as the text that JSON has for it; None stays.

    Raises:
        TypeError: it is of another type.
    """
    if value is None:
        return None
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise TypeError(f"a {type(value).__name__} where a list belongs")
        return [_typed(item, kind[0], where) for item in value]
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise TypeError(f"a {type(value).__name__} where text belongs")
    return check_text(str(value), where)


def _pair(task: Task, columns: Row, origin: str) -> Pair:
    try:
        pair = dataclasses.replace(task.pair(columns), origin=origin)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from error
    later = tuple(dataclasses.replace(turn, origin=f"{origin}, turn {i}") for i, turn in enumerate(pair.later, start=2))
    return dataclasses.replace(pair, later=later)


def _is_filled(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) and all(map(_is_filled, value))
