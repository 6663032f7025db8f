"""A plugin on disk: `plugin.safetensors` (side network and router) and `plugin_config.json` (its config)."""

import abc
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from spa_jax.errors import UserError
from spa_jax.files import read_json, replaced_directory, write_json
from spa_jax.models.combine import Edits
from spa_jax.models.llama import Params
from spa_jax.models.peft import PEFT_SETTINGS, PeftConfig
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig, SideKind
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.hf_config import MOST

FORMAT_VERSION = 4
READABLE = (2, 3, 4)
"""Format 2 knows no inner entry: its corrections enter at `head`. Formats before 4 have no date."""
WEIGHTS, CONFIG = "plugin.safetensors", "plugin_config.json"
ORIGIN = {"backbone": str, "fingerprint": str, "template": ("chat", "plain"), "date": str}
DESCRIPTION = {
    "format_version": int,
    "config": {
        "setting": ("spa", "s1", "s2", "s3"),
        "side": {"kind": get_args(SideKind), "width": int, "taps": [int], "heads": int},
        "hidden_size": int,
        "threshold": float,
        "offset": bool,
        "entry": ("head", int),
        "edits": get_args(Edits),
    },
    **ORIGIN,
}
"""The keys of plugin_config.json, with their types, or their choices of values and types in parentheses."""


Config = TypeVar("Config", PluginConfig, PeftConfig)


@dataclasses.dataclass(frozen=True)
class Trained(abc.ABC, Generic[Config]):
    """Trained parameters with what is needed to run them.

    Attributes:
        config: the method's shape, see `spa_jax.models.method`.
        params: its float32 parameters.
        backbone: name of the backbone it was trained on.
        fingerprint: of that backbone; the hidden states of another one mean nothing to it.
        template: the format of its prompts, `chat` or `plain`.
        date: the day that a chat template with a date writes in them; empty for `spa_jax.chat.DATE`.
    """

    config: Config
    params: Params
    backbone: str
    fingerprint: str
    template: str
    date: str = ""

    def check(self, backbone: Backbone) -> None:
        """Refuses a backbone that this was not trained on.

        Raises:
            UserError: the fingerprints differ.
        """
        if backbone.fingerprint != self.fingerprint:
            raise UserError(
                f"this plugin was trained on the backbone '{self.backbone}' (fingerprint {self.fingerprint}), not on "
                f"'{backbone.name}' (fingerprint {backbone.fingerprint}): use that one, or train a plugin for this one"
            )

    @abc.abstractmethod
    def save(self, directory: Path) -> None:
        """Writes the directory that `load_trained` reads, replacing what was there in one move.

        Raises:
            UserError: the directory cannot be written.
        """


class Plugin(Trained[PluginConfig]):
    """A trained side network and router: its parameters are `{"side": ..., "router": ...}`."""

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify its parameters."""
        return digest_of(self.params)

    def check(self, backbone: Backbone) -> None:
        super().check(backbone)
        entry, blocks = self.config.entry, backbone.config.num_layers
        if entry != "head" and entry >= blocks:
            raise UserError(f"this plugin enters in front of block {entry}, and '{backbone.name}' has {blocks} blocks")

    def save(self, directory: Path) -> None:
        description = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        del description["params"]
        arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(self.params, sep=".").items()}
        with replaced_directory(directory) as new:
            safetensors.numpy.save_file(arrays, new / WEIGHTS)
            write_json(new / CONFIG, description)


def digest_of(params: Params) -> str:
    """Returns 16 hex digits that identify trained parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    parts = [jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes() for path, leaf in leaves]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def load_plugin(directory: Path) -> Plugin:
    """Reads a plugin.

    Raises:
        UserError: no plugin there, another format version, a damaged file, or parameters that don't fit its own config.
    """
    description = read_description(directory / CONFIG, DESCRIPTION)
    side = SideConfig(**{**description["config"]["side"], "taps": tuple(description["config"]["side"]["taps"])})
    config = PluginConfig(**{**description["config"], "side": side})
    arrays = read_arrays(directory / WEIGHTS)
    expected = {name: leaf.shape for name, leaf in flatten_dict(init_plugin(config, abstract=True), sep=".").items()}
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(f"'{directory / WEIGHTS}' does not fit its {CONFIG}: missing, extra or misshapen {wrong}")
    params = unflatten_dict({name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}, sep=".")
    return Plugin(config, params, *(description[name] for name in ORIGIN))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file.

    Raises:
        UserError: it is missing or damaged, or has values that are not finite.
    """
    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read '{path}': {error}") from error
    if wrong := sorted(name for name, array in arrays.items() if not np.isfinite(array).all()):
        raise UserError(f"'{path}' is damaged: values of {', '.join(wrong)} are NaN or infinite")
    return arrays


def read_description(path: Path, pattern: dict[str, Any]) -> dict[str, Any]:
    """Reads a plugin_config.json.

    Raises:
        UserError: it is missing or damaged, of another format version, or not of this pattern.
    """
    try:
        description = read_json(path)
    except OSError as error:
        raise UserError(f"no plugin at '{path.parent}': cannot read {CONFIG} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version not in READABLE:
        formats = " and ".join(map(str, READABLE))
        raise UserError(f"'{path}' has plugin format {version}, this spa_jax reads format {formats}")
    setting = description["config"].get("setting") if isinstance(description.get("config"), dict) else None
    if setting in PEFT_SETTINGS and pattern is DESCRIPTION:
        raise UserError(
            f"'{path.parent}' holds a '{setting}', which works within the backbone and has no side network: it runs "
            "by spa_jax.generate with --channel=none"
        )
    if version < 4:
        description = {"date": "", **description}
    if version == 2 and pattern is DESCRIPTION and isinstance(description.get("config"), dict):
        description["config"] = {"entry": "head", "edits": "targets", **description["config"]}
    if not _matches(description, pattern):
        raise UserError(f"'{path}' is damaged: its keys or values are not those of plugin format {version}")
    if "side" in description["config"]:
        _check_values(path, description["config"])
    return description


def _check_values(path: Path, config: dict[str, Any]) -> None:
    """Refuses values out of range, and taps and edits that do not go with the entry.

    Raises:
        UserError: a size or the threshold is out of range, there is no tap, one above the entry, or the edits are not
            possible.
    """
    side = config["side"]
    sizes = {"hidden_size": config["hidden_size"], "side.width": side["width"], "side.heads": side["heads"]}
    if wrong := [name for name, size in sizes.items() if not 1 <= size <= MOST]:
        raise UserError(f"'{path}' is damaged: {', '.join(wrong)} must be at least 1 and at most {MOST}")
    if side["kind"] == "transformer" and side["width"] % (2 * side["heads"]):
        raise UserError(f"'{path}' is damaged: side.width does not give each of {side['heads']} heads an even width")
    if not 0 <= config["threshold"] <= 1:
        raise UserError(f"'{path}' is damaged: threshold {config['threshold']} does not lie between 0 and 1")
    taps, entry, edits = side["taps"], config["entry"], config["edits"]
    if not taps or min(taps) < 0 or (entry != "head" and max(taps) > entry):
        raise UserError(f"'{path}' is damaged: a side network that enters at {entry} cannot read the taps {taps}")
    if edits == "all" and (entry == "head" or config["offset"]):
        offset = " whose router has an offset" if config["offset"] else ""
        raise UserError(f"'{path}' is damaged: edits 'all' do not go with a plugin that enters at {entry}{offset}")


def _matches(value: Any, pattern: Any) -> bool:
    """Tells whether a JSON value has exactly the keys of the pattern, and everywhere its type or one of its choices."""
    if isinstance(pattern, dict):
        return (
            isinstance(value, dict)
            and value.keys() == pattern.keys()
            and all(_matches(value[k], pattern[k]) for k in pattern)
        )
    if isinstance(pattern, list):
        return isinstance(value, list) and all(_matches(item, pattern[0]) for item in value)
    return value in pattern or type(value) in pattern if isinstance(pattern, tuple) else type(value) is pattern
