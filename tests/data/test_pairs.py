"""Rows of a JSON lines file, and what is said about a bad one."""

import json

import pytest

from spa_jax.data.pairs import Pair, embedded_persona
from spa_jax.data.row_formats import read_pairs
from spa_jax.errors import UserError

GOOD = '{"source": "a", "target": "b"}'


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_rows_are_read_in_order_with_their_origin(write):
    path = write(GOOD + '\n\n{"source": " c ", "target": "d", "answer": "é", "more": 1}\r\n')
    assert read_pairs(path) == [
        Pair("a", "b", None, f"{path}, line 1"),
        Pair(" c ", "d", "é", f"{path}, line 3"),
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_a_line_ends_at_a_line_feed_alone(character, write):
    row = {"source": f"one{character}two", "target": "b"}
    path = write(json.dumps(row, ensure_ascii=False) + "\n" + GOOD)
    assert [pair.source for pair in read_pairs(path)] == [row["source"], "a"]


@pytest.mark.parametrize("line", ["not json", '{"source": "a", "target": ', "{'source': 'a'}", GOOD + GOOD])
def test_a_line_that_is_not_json_is_named_by_number(line, write):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3 is not JSON \("):
        read_pairs(write(f"{GOOD}\n\n{line}\n"))


@pytest.mark.parametrize("line", ["[]", "3", "null", '"text"', '["source", "target"]'])
def test_a_line_that_is_no_object_is_named_by_number(line, write):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is not a JSON object"):
        read_pairs(write(f"{GOOD}\n{line}\n"))


@pytest.mark.parametrize("bad", [None, 3, "", "  ", ["x"], ...])
@pytest.mark.parametrize("column", ["source", "target"])
def test_a_column_missing_empty_or_of_another_type_is_named(column, bad, write):
    row = {"source": "a", "target": "b", "extra": "c"} | {column: bad}
    if bad is ...:
        del row[column]
    with pytest.raises(UserError, match=rf"line 2: column '{column}' .* columns are \[.*'extra'"):
        read_pairs(write(f"{GOOD}\n{json.dumps(row)}\n"))


def test_an_answer_that_is_no_text_is_refused(write):
    with pytest.raises(UserError, match="line 1: column 'answer' is not text"):
        read_pairs(write('{"source": "a", "target": "b", "answer": 3}'))


@pytest.mark.parametrize("column", ["source", "target", "answer"])
def test_half_of_a_surrogate_pair_is_no_text(column, write):
    row = json.dumps({"source": "a", "target": "b", "answer": "c"} | {column: "hi \ud83d"})
    with pytest.raises(UserError, match=rf"line 2: column '{column}' is not text: character 4 is '\\ud83d'"):
        read_pairs(write(f"{GOOD}\n{row}\n"))
    whole = json.dumps({"source": "hi \U0001f600", "target": "b"})
    assert "\\ud83d" in whole
    assert read_pairs(write(whole))[0].source == "hi \U0001f600"


@pytest.mark.parametrize("value", ["9" * 5000, "1e999", "NaN", "[" * 900 + "]" * 900])
def test_what_stands_in_other_columns_is_no_matter(value, write):
    row = f'{{"source": "a", "target": "b", "id": {value}}}'
    assert [pair.source for pair in read_pairs(write(row))] == ["a"]


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 100_000])
def test_what_is_nested_too_deeply_is_named_by_number(value, write):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 has JSON that is nested too deeply"):
        read_pairs(write(f'{GOOD}\n{{"source": "a", "target": "b", "id": {value}'))


@pytest.mark.parametrize(
    "row",
    [
        '{"source": "a", "target": "b", "target": "c"}',
        '{"source": "a", "target": "b", "id": {"target": 1, "target": 2}}',
    ],
)
def test_a_name_that_has_two_values_is_refused(row, write):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 names 'target' twice in one object"):
        read_pairs(write(f"{GOOD}\n{row}\n"))


@pytest.mark.parametrize("content", [GOOD, f"\n{GOOD}\n", f"[{GOOD}]", f"\n[\n{GOOD}\n]\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_part_of_the_first_row_nor_an_arrays_brackets(mark, content, write):
    assert [(pair.source, pair.target) for pair in read_pairs(write(mark + content))] == [("a", "b")]


def test_an_array_that_is_not_json_is_named_by_its_line(write):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 4 is not JSON \("):
        read_pairs(write(f"\n[\n{GOOD},\n{GOOD[:-2]}]"))


def test_a_file_of_windows_editors_is_refused_with_what_to_do(write):
    with pytest.raises(UserError, match=r", line 1: 'utf-8' codec .*; write it as UTF-8"):
        read_pairs(write(GOOD.encode("utf-16")))


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "\ufeff\n", "[]", " [ ]\n"])
def test_a_file_without_rows_is_refused(content, write):
    with pytest.raises(UserError, match=r"rows\.jsonl' has no rows"):
        read_pairs(write(content))


def test_a_file_that_cannot_be_read_is_refused(write, tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"cannot read the data file '{path}'"):
            read_pairs(str(path))
    with pytest.raises(UserError, match=r"cannot read the data file .*, line 2: 'utf-8' codec"):
        read_pairs(write(GOOD.encode() + b'\n{"source": "\xff", "target": "b"}'))


def test_the_embedded_persona_gives_pairs_whose_targets_hold_their_answers():
    train, held_out = embedded_persona(0, 2)
    assert {pair.source for pair in train}.isdisjoint(pair.source for pair in held_out)
    assert len(train) < len(embedded_persona(0, 0)[0])
    answered = [pair for pair in train + held_out if pair.answer]
    assert answered
    assert all(pair.answer.lower() in pair.target.lower() for pair in answered)
    assert all(pair.origin.startswith("persona '") for pair in train + held_out)


def test_a_list_of_turns_that_is_written_as_json_has_no_name_twice_either(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('messages\n"[{""role"": ""user"", ""role"": ""assistant"", ""content"": ""x""}]"\n')
    with pytest.raises(UserError, match=r"rows\.csv, line 2: column 'messages' is neither .*'role' twice"):
        read_pairs(str(path))
