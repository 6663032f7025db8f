"""Reads files of JSON objects, one a line or all in one array, so that every row is named by its place."""

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from spa_jax.errors import UserError


class Number(str):
    """A JSON number as the file writes it, of any length."""


def read_json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row after what names it in messages, such as `rows.jsonl, line 3`; blank lines are no rows.

    Numbers are `Number`s. NaN and the infinities, which are no JSON but what Python writes, are None.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or a row is not a JSON object or nested too deeply.
    """
    try:
        with open(path, "rb") as file:
            for origin, row in _values(file, path):
                if not isinstance(row, dict):
                    raise UserError(f'{origin} is not a JSON object, such as {{"column": "text"}}')
                yield origin, row
    except OSError as error:
        raise UserError(f"cannot read the data file '{path}': {error}") from error


def _values(file: IO[bytes], path: str) -> Iterator[tuple[str, Any]]:
    # The mark may stand within: a file may be several, one after the other.
    lines = ((number, line.removeprefix(codecs.BOM_UTF8).strip()) for number, line in enumerate(file, start=1))
    filled = ((number, line) for number, line in lines if line)
    first, begin = next(filled, (1, b"[]"))
    if begin.startswith(b"["):
        array = _parse(begin + b"\n" + file.read(), path, first)
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(array, start=1))
        return
    yield f"{path}, line {first}", _parse(begin, path, first)
    for number, line in filled:
        yield f"{path}, line {number}", _parse(line, path, number)


def _parse(data: bytes, path: str, first: int) -> Any:
    """Parses the JSON that begins in the line of that number."""
    try:
        return json.loads(data.decode(), parse_int=Number, parse_float=Number, parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        line = first + data[: error.start].count(b"\n")
        raise UserError(f"cannot read the data file '{path}', line {line}: {error}; write it as UTF-8") from error
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise UserError(f"{path}, line {line} is not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{path}, line {first} has JSON that is nested too deeply to be read") from error
