"""The directory of a run: its `config.json`, by which a run finds itself again, and the timing in `summary.json`."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from spa_jax.chat import DATE
from spa_jax.data.encoding import Example
from spa_jax.errors import UserError
from spa_jax.files import is_remote, read_json, write_json
from spa_jax.training.config import RunConfig
from spa_jax.training.processes import barrier, is_main_process
from spa_jax.weights.backbone import Backbone

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
"""Packages whose versions config.json records."""
TIMING = ("train/steps", "time/train_seconds", "tokens/per_second", "data/backbone_passes")
"""Keys of summary.json that describe the process that trained, and not the result."""
LATER_KEYS = {
    "side": {"entry": "head", "edits": "targets"},
    "tap_cache": {"dtype": ""},
    "router": {"labels": "router"},
    "data": {"date": DATE, "hub": "", "columns": ""},
}
"""Config keys that older runs do not have, with what was so before there was a choice."""


def check_writable(workdir: Path) -> None:
    """Refuses a directory on this machine that cannot be written.

    Raises:
        UserError: it cannot.
    """
    try:
        if is_remote(workdir) or not workdir.exists() or (workdir.is_dir() and os.access(workdir, os.W_OK)):
            return
    except OSError as error:  # a name that is too long, or in a directory that cannot be read
        raise UserError(f"cannot write the workdir '{workdir}': {error.strerror}") from error
    raise UserError(f"cannot write the workdir '{workdir}'")


def open_workdir(workdir: Path, config: RunConfig, backbone: Backbone, splits: Sequence[list[Example]]) -> None:
    """Creates the run's directory and its config.json, or checks that the run in it is this one.

    Raises:
        UserError: not writable, or the directory holds a run of another config, backbone or data.
    """
    path = workdir / "config.json"
    barrier("the workdir is not written yet")
    digests = json.dumps([[example.digest for example in split] for split in splits])
    data = hashlib.sha256(digests.encode()).hexdigest()[:32]
    resolved = json.loads(json.dumps(dataclasses.asdict(config)))
    if config.side.entry == "head":
        resolved["side"]["edits"] = "targets"  # the only ones there, whatever the config says
    if path.exists():
        try:
            old = read_json(path)
            before, fingerprint, data_before = old["config"], old["backbone_fingerprint"], old["data_fingerprint"]
            before = _with_later_keys(before)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{path}' is damaged ({error}): choose another --workdir") from error
        if fingerprint != backbone.fingerprint:
            raise UserError(f"'{workdir}' holds a run on another backbone ({fingerprint}): choose another --workdir")
        elsewhere = dict.fromkeys(("mesh", "distributed"))  # a run may move to other devices
        changed = _differences({**before, **elsewhere}, {**resolved, **elsewhere})
        if changed:
            raise UserError(
                f"'{workdir}' holds a run with another config ({'; '.join(changed)}): choose another --workdir"
            )
        if data_before != data:
            raise UserError(f"'{workdir}' holds a run on other data: choose another --workdir")
        return
    barrier("the workdir is read")
    if not is_main_process():
        return
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions = {"python": platform.python_version(), **packages}
    write_json(
        path,
        {
            "config": resolved,
            "backbone_fingerprint": backbone.fingerprint,
            "data_fingerprint": data,
            "versions": versions,
            "git_commit": _git_commit(),
            "devices": [str(device) for device in jax.devices()],
        },
    )


def read_timing(workdir: Path) -> dict[str, float]:
    """Reads the timing in summary.json, for a run that has nothing left to do; empty where there is none."""
    try:
        summary = read_json(workdir / "summary.json")
        return {name: summary[name] for name in TIMING if name in summary}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _with_later_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Adds to the config of an older run the keys that came after it, with the values by which it was trained."""
    return {**config, **{group: {**keys, **config[group]} for group, keys in LATER_KEYS.items()}}


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            d for key in keys for d in _differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == now else [f"{prefix} was {before!r}, is now {now!r}"]


def _git_commit() -> str | None:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
