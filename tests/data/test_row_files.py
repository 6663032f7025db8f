"""Rows of files, against what pandas, datasets and pyarrow write, and what is said of files that are none."""

import gzip
import json

import datasets
import pandas
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from spa_jax.data.row_files import read_rows
from spa_jax.errors import UserError

TEXTS = (
    "plain", "a, b; c\td", 'said "so"', '"', "two\nlines", "two\r\nlines", "1999-05-04", "1999-05-04T10:00:00Z",
    "007", "4.50", "NA", "null", "true", "[1]", " spaces ", "é 😀 日本語", "one\u2028line", "\ufeffmark",
)  # fmt: skip
FRAME = pandas.DataFrame({"source": TEXTS, "target": reversed(TEXTS), "n": range(len(TEXTS))})
TABLE = pyarrow.Table.from_pandas(FRAME)
DATASET = datasets.Dataset(TABLE)
WRITERS = {
    "pandas.csv": lambda path: FRAME.to_csv(path, index=False),
    "pandas.csv.gz": lambda path: FRAME.to_csv(path, index=False),
    "marked.csv": lambda path: FRAME.to_csv(path, index=False, encoding="utf-8-sig"),
    "excel.csv": lambda path: FRAME.to_csv(path, index=False, sep=";", lineterminator="\r\n"),
    "quoted.CSV": lambda path: FRAME.to_csv(path, index=False, quoting=1),
    "pandas.tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "pandas.jsonl": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "pandas.json": lambda path: FRAME.to_json(path, orient="records", indent=2),
    "pandas.json.gz": lambda path: FRAME.to_json(path, orient="records", force_ascii=False),
    "pandas.parquet": lambda path: FRAME.to_parquet(path),
    "categories.parquet": lambda path: FRAME.astype({"source": "category"}).to_parquet(path),
    "datasets.csv": DATASET.to_csv,
    "datasets.jsonl": DATASET.to_json,
    "datasets.json": lambda path: DATASET.to_json(path, lines=False),
    "datasets.parquet": DATASET.to_parquet,
    "arrow.csv": lambda path: pyarrow.csv.write_csv(TABLE, path),
    "arrow.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path, row_group_size=3, compression="zstd"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_text_is_what_was_written(name, zipped, tmp_path):
    path = tmp_path / name
    WRITERS[name](str(path))
    if zipped and not name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    rows = [row for _, row in read_rows(str(path))]
    assert [(row["source"], row["target"]) for row in rows] == list(zip(TEXTS, reversed(TEXTS)))
    assert [str(row["n"]) for row in rows] == list(map(str, range(len(TEXTS))))


def test_what_json_writes_may_be_zipped_whatever_it_is_called(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps({"a": "b"}).encode()))
    assert list(read_rows(str(path))) == [(f"{path}, line 1", {"a": "b"})]


def test_rows_are_named_by_the_line_they_begin_in(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"a", b\n1,"x\r\n\ny\rz"\n\n2,z\n', newline="")
    assert list(read_rows(str(path))) == [
        (f"{path}, line 2", {"a": "1", "b": "x\r\n\ny\rz"}),
        (f"{path}, line 6", {"a": "2", "b": "z"}),
    ]


def test_a_field_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1," + "x" * 300_000)
    ((_, row),) = read_rows(str(path))
    assert len(row["b"]) == 300_000


def test_columns_that_are_not_text_may_be_there(tmp_path):
    when = pyarrow.array([2**40], pyarrow.timestamp("us"))
    table = pyarrow.table(
        {"a": ["b"], "when": when, "map": pyarrow.array([[("k", 1)]], pyarrow.map_("string", "int8"))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((_, row),) = read_rows(str(tmp_path / "rows.parquet"))
    assert (row["a"], row["when"]) == ("b", when[0].as_py())


@pytest.mark.parametrize("kind", [pyarrow.timestamp("us"), pyarrow.duration("s")], ids=str)
def test_a_column_whose_values_python_does_not_have_is_named(kind, tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"a": ["b"], "when": pyarrow.array([2**62], kind)}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"a\.parquet: column 'when' cannot be read \(.*\): leave it out"):
        list(read_rows(str(tmp_path / "a.parquet")))


def test_a_column_of_parquet_that_is_there_twice_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet names a column twice: a, a"):
        list(read_rows(str(tmp_path / "a.parquet")))


BAD = {
    "more.csv": (b"a,b\n1,2\n1,2,3\n", r"more\.csv, line 3 has 3 fields, and the header has 2: put text with commas"),
    "fewer.csv": (b"a,b\n1\n", r"line 2 has 1 fields, and the header has 2"),
    "mac.csv": (b"a,b\r1,2\r3,4\r", r"mac\.csv, line 1 is not CSV \(new-line character"),
    "open.csv": (b'a,b\n1,2\n3,"4\n5,6\n', r"open\.csv, line 3 is not CSV \(unexpected end of data\)"),
    "stray.csv": (b'a,b\n"1"2,3\n', r"stray\.csv, line 2 is not CSV"),
    "twice.csv": (b"a,b,a\n1,2,3\n", r"line 1 names a column twice: a, b, a"),
    "latin.csv": ("a,b\n1,2\n3,é\n".encode("latin-1"), r"latin\.csv', line 3: 'utf-8' codec .*; write it as UTF-8"),
    "wide.csv": ("a,b\n1,2\n".encode("utf-16"), r"wide\.csv', line 1: 'utf-8' codec .*; write it as UTF-8"),
    "table.xlsx": (b"PK\x03\x04\x9f", r"table\.xlsx', line 1: .* as JSON, CSV \(\.csv, \.tsv\) or Parquet"),
    "no.parquet": (b'{"a": "b"}', r"no\.parquet' as Parquet: "),
    "empty.parquet": (b"", r"empty\.parquet' as Parquet: "),
    "cut.jsonl.gz": (gzip.compress(b'{"a": "b"}\n' * 100)[:-9], r"cannot read the data file '.*cut\.jsonl\.gz': "),
    "spoilt.gz": (gzip.compress(b'{"a": "b"}\n')[:10] + b"\xff" * 9, r"cannot read the data file '.*spoilt\.gz': "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_what_its_name_says_is_refused(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["empty.csv", "empty.jsonl", "header.csv"])
def test_a_file_may_have_no_rows(name, tmp_path):
    (tmp_path / name).write_text("a,b\n" if name == "header.csv" else "")
    assert list(read_rows(str(tmp_path / name))) == []
