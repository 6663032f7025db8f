"""Data sets of the Hugging Face hub."""

import logging
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from spa_jax.data.pairs import Pair
from spa_jax.data.row_files import Rows, read_rows, warn_of_left_out
from spa_jax.data.row_formats import to_pairs
from spa_jax.errors import UserError

PARQUET = "refs/convert/parquet"
"""Revision with the hub's own conversion to Parquet, for data sets that need a loading script."""

log = logging.getLogger(__name__)


def from_hub(load: Callable[..., Any], hub: str, config: str | None, advice: str, **options: Any) -> Any:
    """Calls a loader of `datasets`, without its progress bars and its log.

    Args:
        load: such as `datasets.load_dataset`.
        hub: name of the data set, `org/name`.
        config: name of its configuration; None for its only one.
        advice: what to do where it cannot be read.
        options: further arguments of the loader.

    Raises:
        UserError: the hub cannot be reached, or has nothing of these names.
    """
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which else tells of every retry
    try:
        try:
            return load(hub, config, **options)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            log.info("%s is laid out by a script; reading the hub's conversion to Parquet", hub)
            return load(hub, config, **options, revision=PARQUET)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).splitlines()[:2]) or type(error).__name__
        raise UserError(f"cannot read '{hub}' from the hub ({reason}): {advice}") from error


def read_hub(name: str, columns: str = "") -> tuple[list[Pair], list[Pair]]:
    """Reads the splits `train` and `validation` of a data set in any of `spa_jax.data.row_formats.FORMATS`.

    `datasets` says which files they are. These are read here, since it would guess what their values are: of
    `1999-05-04` it makes a time of day.

    Args:
        name: `org/name`, or `org/name:config` where there are several configurations, or a directory.
        columns: see `spa_jax.data.row_formats.read_pairs`.

    Returns:
        Rows to train on, and rows to evaluate on, which are none if the data set has no such split. Rows with nothing
        to learn are left out, with a warning.

    Raises:
        UserError: the hub or a file cannot be read, there is no split `train`, or a row is not of the format.
    """
    import datasets

    hub, _, config = name.partition(":")
    if "/" not in hub:  # of `json`, the name of one of its loaders, `datasets` makes whatever lies in this directory
        if not os.path.isdir(hub):
            raise UserError(f"data.hub is '{name}': write org/name, org/name:CONFIG, or a directory")
        hub = os.path.join(os.curdir, hub)
    advice = "check the name and the network, write org/name:CONFIG if it has several, or download it for data.train"
    builder = from_hub(datasets.load_dataset_builder, hub, config or None, advice)
    files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    if "train" not in files:
        raise UserError(f"'{name}' has no split 'train', but {', '.join(files) or 'none'}: download it for data.train")
    train, validation = (
        _read_split(f"{name} ({split})", files[split], columns) if split in files else []
        for split in ("train", "validation")
    )
    return train, validation


def _read_split(where: str, paths: Iterable[str], columns: str) -> list[Pair]:
    pairs, skipped = to_pairs(_rows(paths), where, columns, skip=True)
    warn_of_left_out(skipped, len(pairs))
    return pairs


def _rows(paths: Iterable[str]) -> Rows:
    import datasets

    for path in paths:
        try:
            local = datasets.DownloadManager().download(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot download '{path}' ({error}): try again") from error
        yield from read_rows(str(local), re.sub("@[0-9a-f]{40}", "", path))
