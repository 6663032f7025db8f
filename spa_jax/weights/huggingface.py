"""Loads LLaMA checkpoints in Hugging Face's format: a local directory of safetensors, or a name on the hub."""

import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Float
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from spa_jax.errors import UserError
from spa_jax.files import read_json
from spa_jax.models.compute import Weights
from spa_jax.weights.backbone import Backbone, check_vocabulary
from spa_jax.weights.hf_config import llama_config_from_hf
from spa_jax.weights.mapping import Shardings, convert

log = logging.getLogger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_HUB_TIMEOUT_SECONDS = 3.0
_DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


class HubUnavailable(UserError):
    """The hub cannot be reached, or does not give this model."""


def load_directory(
    path: str | pathlib.Path,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    weights: Weights = "float",
    read_weights: bool = True,
) -> Backbone:
    """Loads a checkpoint as `save_pretrained` writes it.

    Args:
        path: a directory with `config.json`, `model.safetensors` or its shards and index, and `tokenizer.json`.
        dtype: dtype of the parameters, float32 or bfloat16.
        shardings, weights: see `mapping.convert`.
        read_weights: whether they are read; else the backbone has no parameters and no fingerprint.

    Raises:
        UserError: a file is missing or corrupt, or the config needs something that is not supported.
    """
    path = pathlib.Path(path)
    described = _read_json(path / "config.json")
    config = llama_config_from_hf(described)
    tokenizer = load_tokenizer(path)
    eos = _eos_ids(path, described, tokenizer)
    check_vocabulary(path, config, tokenizer, eos)
    kind = described["model_type"]
    log.info("%s: %s with %d blocks of width %d", path, kind, config.num_layers, config.hidden_size)
    source = SafetensorsSource(path)
    params, fingerprint = convert(config, source, dtype, shardings, weights) if read_weights else ({}, "")
    return Backbone(str(path), config, params, tokenizer, eos, fingerprint)


def load_tokenizer(directory: pathlib.Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a directory, exactly as its `tokenizer.json` says.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not (directory / "tokenizer.json").is_file():
        raise UserError(
            f"{directory} has no tokenizer.json; write one with transformers: "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(directory)!r})."
        )
    try:
        # How long a text may be is the config's to say, and data.max_length's.
        return PreTrainedTokenizerFast.from_pretrained(
            directory, clean_up_tokenization_spaces=False, model_max_length=VERY_LARGE_INTEGER
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{directory}/tokenizer.json cannot be read ({error}); fetch the checkpoint again.") from error


class _StoredTensor(NamedTuple):
    """Where a tensor is stored: file, dtype, first byte and shape."""

    file: pathlib.Path
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]


class SafetensorsSource:
    """A `TensorSource` over a directory of safetensors; tensors are memory maps, so only what is used is read."""

    def __init__(self, directory: pathlib.Path) -> None:
        index = directory / INDEX_FILE
        if (directory / SINGLE_FILE).is_file():
            promised: dict[str, str] | None = None
            files = [SINGLE_FILE]
        elif index.is_file():
            promised = _read_json(index).get("weight_map")
            if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
                raise UserError(f"{index} has no weight_map that names the file of each tensor; fetch it again.")
            files = sorted(set(promised.values()))
        else:
            raise UserError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a directory with one of them."
            )
        if missing := [name for name in files if not (directory / name).is_file()]:
            raise UserError(
                f"{directory} lacks {', '.join(missing)}, which {INDEX_FILE} names; fetch the checkpoint again."
            )
        self._tensors: dict[str, _StoredTensor] = {}
        for name in files:
            self._scan(directory / name)
        if promised is not None:
            stray = {name for name in promised.keys() | self._tensors.keys() if promised.get(name) != self._shard(name)}
            if stray:
                raise UserError(f"{index} and its shards disagree about {', '.join(sorted(stray))}; fetch them again.")

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        file, dtype, offset, shape = self._tensors[name]
        return np.memmap(file, dtype, "r", offset, shape)

    def _shard(self, name: str) -> str | None:
        return self._tensors[name].file.name if name in self._tensors else None

    def _scan(self, path: pathlib.Path) -> None:
        with _open(path), path.open("rb") as file:  # the library checks it, but does not say where a tensor begins
            length = int.from_bytes(file.read(8), "little")
            described = json.loads(file.read(length))
        described.pop("__metadata__", None)
        for name, tensor in described.items():
            dtype, (begin, _) = tensor["dtype"], tensor["data_offsets"]
            if dtype not in _DTYPES:
                raise UserError(
                    f"{path}: {name} is {dtype}, supported are {', '.join(_DTYPES)}; choose a checkpoint that is not "
                    "quantised."
                )
            self._tensors[name] = _StoredTensor(path, _DTYPES[dtype], 8 + length + begin, tuple(tensor["shape"]))


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or truncated ({error}); fetch it again.") from error


def is_hub_name(name: str) -> bool:
    """Says whether a name looks like `org/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def download_snapshot(name: str) -> pathlib.Path:
    """Returns the directory of a hub model, downloading it on first use; honours `HF_HUB_OFFLINE` and `HF_HOME`.

    Raises:
        HubUnavailable: the hub does not answer or refuses, and there is no copy in its cache.
    """
    # Which exceptions come out depends on the HTTP library below, which differs between releases of huggingface_hub.
    unreachable: Exception | None = None
    try:
        # A short question first: the download itself waits 10 s for an answer, and asks several times.
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:
        unreachable = error
    try:
        local_only = unreachable is not None
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED_FILES, local_files_only=local_only)
        )
    except Exception as error:
        reason = (str(unreachable or error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise HubUnavailable(
            f"Cannot get {name} from the Hugging Face hub ({reason}); check name and network, accept its licence "
            f"and set HF_TOKEN if it is gated, or give the path of a local copy."
        ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        parsed = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a directory written by save_pretrained.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again.") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again.")
    return parsed


def _eos_ids(path: pathlib.Path, described: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the ids that end a generation, ascending, of the first place that names some, as transformers does:
    generation_config.json, config.json, the tokenizer.

    Raises:
        UserError: one of the files names something else than ids.
    """
    file = path / "generation_config.json"
    generation = _read_json(file) if file.is_file() else {}
    for name, given in ((file.name, generation.get("eos_token_id")), ("config.json", described.get("eos_token_id"))):
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise UserError(
                f"{path / name}: eos_token_id = {given!r} is not supported, only a token id or a list of them; correct "
                "it."
            )
        if ids:
            return tuple(sorted(set(ids)))
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
