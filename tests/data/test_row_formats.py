"""The formats of rows: what each becomes, how one is recognised, and what is refused."""

import itertools
import json
import re
from pathlib import Path

import datasets
import pandas
import pytest

from spa_jax.data.pairs import Pair, Turn
from spa_jax.data.row_formats import FORMATS, parse_columns, read_pairs, recognise, write_pairs
from spa_jax.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "When?"}, {"role": "assistant", "content": "1999-05-04"},
]  # fmt: skip
BRIEF = (Turn("system", "Be brief."),)


def shared(turns):
    """Turns as ShareGPT names them."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def weighed(*weights):
    return {"messages": [turn if weight is None else {**turn, "weight": weight} for turn, weight in zip(CHAT, weights)]}


def talk(*learnt, context=()):
    """`CHAT` as a pair, without names of rows."""
    first, second = (
        Pair(question["content"], answer["content"], learnt=one)
        for question, answer, one in zip(CHAT[::2], CHAT[1::2], learnt)
    )
    return Pair(first.source, first.target, later=(second,), context=context, learnt=first.learnt)


def nameless(pair):
    return Pair(
        pair.source, pair.target, pair.answer, "", tuple(nameless(turn) for turn in pair.later), pair.references,
        pair.context, pair.learnt,
    )  # fmt: skip


ROWS = {
    "source": ({"source": "a", "target": "b", "answer": "c", "id": 1}, Pair("a", "b", "c")),
    "messages": ({"messages": CHAT}, talk(True, True)),
    "system": ({"messages": [SYSTEM, *CHAT], "tools": None}, talk(True, True, context=BRIEF)),
    "developer": ({"messages": [{**SYSTEM, "role": "developer"}, *CHAT]}, talk(True, True, context=BRIEF)),
    "blank system": ({"messages": [{**SYSTEM, "content": ""}, *CHAT]}, talk(True, True)),
    "system column": ({"messages": CHAT, "system": "Be brief."}, talk(True, True, context=BRIEF)),
    "weight 0": (weighed(None, 0, None, 1), talk(False, True)),
    "weight 0.0": (weighed(None, 0.0, 0, 1.0), talk(False, True)),
    "last has weight 0": (weighed(None, None, None, 0), Pair("Hi", "Hello.")),
    "last is a question": ({"messages": [*CHAT, {"role": "user", "content": "Why?"}]}, talk(True, True)),
    "two questions": ({"messages": [*CHAT[::2], CHAT[3]]}, Pair("When?", "1999-05-04", context=(Turn("user", "Hi"),))),
    "begins with a greeting": (
        {"conversations": shared([SYSTEM, *CHAT[1:]])},
        Pair("When?", "1999-05-04", context=(*BRIEF, Turn("assistant", "Hello."))),
    ),
    "system later": (
        {"messages": [*CHAT[:2], SYSTEM, *CHAT[2:]]},
        Pair("Hi", "Hello.", later=(Pair("When?", "1999-05-04", context=BRIEF),)),
    ),
    "parts": (
        turns(
            ("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
            ("assistant", [{"type": "text", "text": "Hello."}]),
        ),
        Pair("Hi", "Hello."),
    ),
    "mapping of lists": (
        {"messages": {key: [turn[key] for turn in CHAT] for key in ("role", "content")}},
        talk(True, True),
    ),
    "ShareGPT": ({"conversations": shared([SYSTEM, *CHAT])}, talk(True, True, context=BRIEF)),
    "ShareGPT in OpenAI's names": ({"conversations": CHAT, "id": "x"}, talk(True, True)),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "text": "Below is ..."},
        Pair("Add.\n\n1 + 1", "2"),
    ),
    "Alpaca without input": ({"instruction": "Sing.", "input": "", "output": "La"}, Pair("Sing.", "La")),
    "Alpaca with system": (
        {"instruction": "Sing.", "output": "La", "system": "Be brief."},
        Pair("Sing.", "La", context=BRIEF),
    ),
    "prompt": ({"prompt": "a\n\n###\n\n", "completion": " b"}, Pair("a\n\n###\n\n", " b")),
    "prompt of turns": (
        {"prompt": [SYSTEM, *CHAT[:3]], "completion": CHAT[3:]},
        talk(False, True, context=BRIEF),
    ),
}
WRITERS = {
    "jsonl": lambda path, row: Path(path).write_text(json.dumps(row)),
    "parquet": lambda path, row: datasets.Dataset.from_list([row]).to_parquet(path),
    "pandas.parquet": lambda path, row: pandas.DataFrame([row]).to_parquet(path),
    "csv": lambda path, row: pandas.DataFrame(
        [{name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in row.items()}]
    ).to_csv(path, index=False),
}


CSV_HAS_TEXT_ALONE = {("prompt of turns", "csv")}


@pytest.mark.parametrize(
    ("case", "container"), [both for both in itertools.product(ROWS, WRITERS) if both not in CSV_HAS_TEXT_ALONE]
)
def test_rows_are_read_as_what_they_say(case, container, tmp_path):
    row, expected = ROWS[case]
    path = str(tmp_path / f"rows.{container}")
    WRITERS[container](path, row)
    (pair,) = read_pairs(path)
    assert nameless(pair) == expected
    assert pair.origin.startswith(path)


def read(row, tmp_path, columns=""):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    return read_pairs(str(path), columns)


REFUSED = {
    "no answer": (turns(("user", "a")), "line 1 has no answer to a user's turn that is to be learnt"),
    "nothing learnt": (weighed(None, 0, None, 0), "has no answer to a user's turn that is to be learnt"),
    "no turns": ({"messages": []}, "column 'messages' is missing or empty"),
    "no list": ({"messages": 3}, "column 'messages' is no list of turns"),
    "Python": ({"messages": "[{'role': 'user'}]"}, "column 'messages' is neither a list of turns nor JSON of one"),
    "deep": ({"messages": "[" * 100_000}, "column 'messages' is neither a list of turns nor JSON of one"),
    "no turn": ({"messages": ["a"]}, "line 1, turn 1 is no turn, such as"),
    "role": (
        turns(("user", "a"), ("tool", "b")),
        "turn 2 has the role 'tool', and those that can be read are system, ",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "turn 1 has the role None"),
    "empty": (turns(("user", "a"), ("assistant", " ")), r"turn 2 is empty; keys are \['content', 'role'\]"),
    "no text": (turns(("user", "a"), ("assistant", 3)), "turn 2 has content that is not text"),
    "picture": (turns(("user", [{"type": "image_url", "image_url": {}}])), "turn 1 has content that is not text"),
    "tool": ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{}]}]}, "turn 2 calls a tool, which cannot be learnt"),
    "weight": (weighed(None, 0.5), "turn 2 has the weight '0.5': write 0 for an answer that is not to be learnt, or 1"),
    "two answers": (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), "follows no user's turn: join it"),
    "surrogate": (turns(("user", "hi \ud83d"), ("assistant", "b")), r"turn 1 is not text: character 4 is '\\ud83d'"),
    "input": ({"instruction": "a", "input": 3, "output": "b"}, "column 'input' is not text"),
    "completion": ({"prompt": CHAT[:1], "completion": "b"}, "column 'completion' is neither a list of turns nor"),
    "unknown": (
        {"question": "a", "reply": "b"},
        r"line 1: the columns question, reply are of no format that can be read \(source and target; messages;"
        r" .*data\.columns=source=\.\.\.,target=\.\.\. \(of check and evaluate: --columns=",
    ),
    "none": ({}, "the columns of no name are of no format"),
    "ambiguous": (
        {"messages": CHAT, "instruction": "a", "output": "b"},
        "instruction, messages, output can be read as messages or as instruction and output: say which, such as by "
        "data.columns=messages=messages$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_is_refused_by_row(case, tmp_path):
    row, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        read(row, tmp_path)


def test_columns_may_have_other_names(tmp_path):
    row = {"question": "a", "reply": "b", "messages": CHAT, "source": 3}
    (pair,) = read(row, tmp_path, "source=question, target = reply")
    assert nameless(pair) == Pair("a", "b")
    (pair,) = read(row, tmp_path, "conversations=messages")
    assert nameless(pair) == talk(True, True)
    with pytest.raises(UserError, match=r"line 1: column 'answer', which data\.columns names, is missing; columns are"):
        read(row, tmp_path, "source=question,target=answer")
    with pytest.raises(UserError, match=r"the columns source are of no format"):
        read(row, tmp_path, "source=question")


@pytest.mark.parametrize("text", ["question", "source=", "quelle=question", "source=a,source=b", "=a", ","])
def test_names_of_columns_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"write our names of columns and yours, such as .*; ours are answer, "):
        parse_columns(text)


def test_the_log_says_what_a_file_was_taken_for(tmp_path, caplog):
    caplog.set_level("INFO", "spa_jax")
    read({"messages": CHAT}, tmp_path)
    assert caplog.messages == [f"the data file '{tmp_path}/rows.jsonl' has 1 rows of messages"]


def test_every_example_of_the_documentation_is_of_its_format(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    examples = [json.loads(text) for text in re.findall(r"^\| .*? \| `(\{.*\})` \|", page, re.MULTILINE)]
    assert [recognise(row, "") for row in examples] == list(FORMATS)
    for row in examples:
        read(row, tmp_path)


def test_pairs_that_are_written_are_read_again(tmp_path):
    context = (*BRIEF, Turn("assistant", "Hello?"))
    pairs = [Pair("a\u2028\nb", "\u65e5"), talk(True, True, context=context), talk(False, True)]
    write_pairs(tmp_path / "rows.jsonl", pairs)
    found = read_pairs(str(tmp_path / "rows.jsonl"))
    assert [nameless(pair) for pair in found] == pairs
