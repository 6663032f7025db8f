"""Finds and reads files, and writes them atomically: under a temporary name, then moved, so that a file is there whole
or not at all.

In a storage bucket files are written directly, since there a file appears only when it is complete.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from etils import epath

from spa_jax.errors import UserError


def named_path(name: str) -> Path:
    """Makes a path on this machine of what a user writes, `~` being a home directory where there is one.

    Ask `os.path` whether it exists: a name that is too long or in a directory that cannot be read is none to it, and
    an error to `Path`.
    """
    return Path(os.path.expanduser(name))


def path_of(name: str) -> Path:
    """Makes a path on this machine, or in a storage bucket such as `gs://bucket/run`, with the same methods."""
    return cast(Path, epath.Path(name)) if "://" in name else Path(name)


def is_remote(path: Path) -> bool:
    """Says whether a path made by `path_of` is in a storage bucket."""
    return not isinstance(path, Path)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes or replaces a file, and makes its directory.

    Raises:
        UserError: the file or its directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            path.write_bytes(data)
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # the latter of a name with a null character
        raise UserError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: Path, value: Any) -> None:
    """Writes or replaces a JSON file, indented; NaN and the infinities, which JSON does not have, become null."""
    write_bytes(path, (json.dumps(_with_nulls(value), indent=2, allow_nan=False) + "\n").encode())


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yields a new directory to fill with files, which replaces `path` if the block ends without an exception.

    In a storage bucket, where nothing can be moved, the files replace the old ones one by one.

    Raises:
        UserError: `path` cannot be written, or is a plain file.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            for file in Path(local).iterdir():
                write_bytes(path / file.name, file.read_bytes())
        return
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write '{path}': a file stands in its place; move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        new.chmod(0o755)
    except (OSError, ValueError) as error:  # the latter of a name with a null character
        raise UserError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from error
    try:
        yield new
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.rename(old / "old")
            new.rename(path)
            shutil.rmtree(old)
        else:
            new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
