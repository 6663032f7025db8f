"""Reads files of rows: JSON, CSV and Parquet. Every row is named by its place, and text is what the file has, whatever
it looks like."""

import codecs
import csv
import gzip
import itertools
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedIOBase, BytesIO
from pathlib import PurePath
from typing import Any

from spa_jax.errors import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Rows as they are read, each after what names it in messages, such as `rows.jsonl, line 3`."""

log = logging.getLogger(__name__)


class Number(str):
    """A JSON number as the file writes it, of any length."""


def read_rows(path: str, name: str = "") -> Rows:
    """Yields the rows of a file, gzipped or not, with or without a byte-order mark.

    The end of its name says what it is: CSV (`.csv`, `.tsv`), whose values are all text; Parquet (`.parquet`); else
    JSON, an object a line or all in one array, whose numbers are `Number`s, and whose NaN and infinities, which are no
    JSON but what Python writes, are None. Blank lines are no rows.

    Args:
        path: of the file.
        name: the file's name in messages and by its end, if it is not the path.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or not of its format, or a row is none.
    """
    name = name or path
    reader = READERS.get(PurePath(name.lower().removesuffix(".gz")).suffix, _read_json)
    try:
        with open(path, "rb") as file, gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file as content:
            yield from reader(content, name)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read the data file '{name}': {error}") from error


def warn_of_left_out(reasons: Sequence[str], kept: int) -> None:
    """Says in the log how many rows are left out beside those that are kept, and why the first one is."""
    if reasons:
        log.warning("%d of %d rows are left out, the first since %s", len(reasons), len(reasons) + kept, reasons[0])


class RepeatedName(ValueError):
    """An object of JSON has two values of one name, of which any reader would take one."""


def parse_json(text: str) -> Any:
    """Parses JSON; numbers are `Number`s, and NaN and the infinities None.

    Raises:
        json.JSONDecodeError: it is none.
        RecursionError: it is nested too deeply.
        RepeatedName: an object has a name twice.
    """
    return json.loads(
        text, parse_int=Number, parse_float=Number, parse_constant=lambda _: None, object_pairs_hook=_object
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedName(f"names '{twice}' twice in one object: leave one of them out")
    return values


def _read_json(file: BufferedIOBase, name: str) -> Rows:
    for origin, row in _values(file, name):
        if not isinstance(row, dict):
            raise UserError(f'{origin} is not a JSON object, such as {{"column": "text"}}')
        yield origin, row


def _values(file: BufferedIOBase, name: str) -> Iterator[tuple[str, Any]]:
    # The mark may stand within: a file may be several, one after the other.
    lines = ((number, line.removeprefix(codecs.BOM_UTF8).strip()) for number, line in enumerate(file, start=1))
    filled = ((number, line) for number, line in lines if line)
    first, begin = next(filled, (1, b"[]"))
    if begin.startswith(b"["):
        array = _parse(begin + b"\n" + file.read(), name, first)
        yield from ((f"{name}, row {i}", row) for i, row in enumerate(array, start=1))
        return
    yield f"{name}, line {first}", _parse(begin, name, first)
    for number, line in filled:
        yield f"{name}, line {number}", _parse(line, name, number)


def _parse(data: bytes, name: str, first: int) -> Any:
    """Parses the JSON that begins in the line of that number."""
    try:
        return parse_json(_decode(data, name, first))
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise UserError(f"{name}, line {line} is not JSON ({error.msg}, column {error.colno})") from error
    except RepeatedName as error:
        raise UserError(f"{name}, line {first} {error}") from error
    except RecursionError as error:
        raise UserError(f"{name}, line {first} has JSON that is nested too deeply to be read") from error


def _decode(data: bytes, name: str, first: int) -> str:
    """Decodes the text that begins in the line of that number."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first + data[: error.start].count(b"\n")
        raise UserError(
            f"cannot read the data file '{name}', line {line}: {error}; write it as UTF-8, and as JSON, CSV (.csv, "
            ".tsv) or Parquet (.parquet)"
        ) from error


def _read_csv(file: BufferedIOBase, name: str) -> Rows:
    """Reads a header and rows, between whose fields are commas, semicolons or tabs, whichever the header has most."""
    lines = (_decode(line, name, number) for number, line in enumerate(file, start=1))
    first = next(lines, "").removeprefix("\ufeff")
    csv.field_size_limit(2**31 - 1)
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    begin = 1
    try:
        header = [column.strip() for column in next(reader, [])]
        if len(set(header)) < len(header):
            raise UserError(f"{name}, line 1 names a column twice: {', '.join(header)}")
        begin = reader.line_num + 1
        for row in reader:
            origin, begin = f"{name}, line {begin}", reader.line_num + 1
            if row and len(row) != len(header):
                raise UserError(
                    f"{origin} has {len(row)} fields, and the header has {len(header)}: put text with commas, "
                    "semicolons or line breaks in double quotes"
                )
            if row:
                yield origin, dict(zip(header, row))
    except csv.Error as error:
        raise UserError(f"{name}, line {begin} is not CSV ({error})") from error


def _read_parquet(file: BufferedIOBase, name: str) -> Rows:
    import pyarrow.parquet

    try:
        # Parquet is read from its end, which a gzipped file does not have.
        content = BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
        batches = pyarrow.parquet.ParquetFile(content).iter_batches()
        for number, row in enumerate((row for batch in batches for row in _rows_of(batch, name)), start=1):
            yield f"{name}, row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"cannot read the data file '{name}' as Parquet: {error}") from error


def _rows_of(batch: Any, name: str) -> Iterator[dict[str, Any]]:
    columns = {}
    for column, values in zip(batch.schema.names, batch.columns):
        if column in columns:
            raise UserError(f"{name} names a column twice: {', '.join(batch.schema.names)}")
        try:
            columns[column] = values.to_pylist()
        except (OverflowError, ValueError) as error:  # such as a date that Python does not have
            raise UserError(f"{name}: column '{column}' cannot be read ({error}): leave it out") from error
    return (dict(zip(columns, values)) for values in zip(*columns.values()))


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
"""End of a file's name -> the function that reads it; a file with any other is JSON."""
