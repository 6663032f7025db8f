"""Files and directories that are there whole or not at all."""

import json
import stat

import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.files import named_path, read_json, replaced_directory, write_bytes, write_json


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_written_with_its_parents_and_then_replaced(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"n": 1})
    write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 2}
    assert names(path.parent) == ["b.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    write_json(tmp_path / "a.json", {"a": [1.5, -inf, inf], "b": {"c": (nan, 2)}, "d": np.float64(nan), "e": "NaN"})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None, None], "b": {"c": [None, 2]}, "d": None, "e": "NaN",
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 5000])
def test_what_is_no_json_is_a_value_error(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_a_home_directory_that_is_none_is_a_name_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_path("~/plugin") == tmp_path / "plugin"
    assert str(named_path("~nobody-of-this-name/plugin")) == "~nobody-of-this-name/plugin"


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert names(tmp_path) == ["a.json"]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_directory_is_replaced_by_what_the_block_wrote(tmp_path):
    path = tmp_path / "run" / "plugin"
    for name in ("one", "two"):
        with replaced_directory(path) as new:
            (new / name).write_text(name)
            assert name not in (names(path) if path.exists() else [])
    assert names(path) == ["two"]
    assert names(path.parent) == ["plugin"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("there", [True, False])
def test_a_block_that_raises_leaves_the_directory_as_it_was(there, tmp_path):
    path = tmp_path / "plugin"
    if there:
        path.mkdir()
        (path / "old").write_text("")

    def fill():
        with replaced_directory(path) as new:
            (new / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert names(tmp_path) == (["plugin"] if there else [])
    assert not there or names(path) == ["old"]


def test_a_place_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write '.*file/a': File exists"):
        write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(UserError, match="cannot write"), replaced_directory(tmp_path / "file" / "a"):
        raise AssertionError
    assert names(tmp_path) == ["file"]


def test_a_file_in_the_place_of_a_directory_is_refused_and_kept(tmp_path):
    path = tmp_path / "plugin"
    path.write_text("mine")
    with pytest.raises(UserError, match="a file stands in its place"), replaced_directory(path):
        pass
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["plugin"]
