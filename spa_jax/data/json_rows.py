"""Reads files of JSON objects, one a line or all in one array, so that every row is named by its place."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"cannot read the data file '{path}': {error}") from error
    if data.lstrip().startswith(b"["):
        rows = [(f"{path}, row {i}", row) for i, row in enumerate(_parse(data, path, 1), start=1)]
    else:
        lines = enumerate(data.split(b"\n"), start=1)
        rows = ((f"{path}, line {i}", _parse(line, path, i)) for i, line in lines if line.strip())
    for origin, row in rows:
        if not isinstance(row, dict):
            raise UserError(f'{origin} is not a JSON object such as {{"source": "...", "target": "..."}}')
        yield origin, row


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
