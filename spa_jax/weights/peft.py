"""A LoRA or Adapter on disk, beside a `plugin_config.json` that names its setting and the backbone it was trained on.

A LoRA is in the format of PEFT: `adapter_model.safetensors` and `adapter_config.json`, and one that PEFT trained on the
same backbone can be read without our `plugin_config.json`. An Adapter, which PEFT does not have, is in
`plugin.safetensors`.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from spa_jax.errors import UserError
from spa_jax.files import read_json, replaced_directory, write_json
from spa_jax.models.llama import Params
from spa_jax.models.peft import TARGETS, PeftConfig, init_peft
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.mapping import TABLE
from spa_jax.weights.plugin import (
    CONFIG,
    FORMAT_VERSION,
    ORIGIN,
    WEIGHTS,
    Plugin,
    Trained,
    load_plugin,
    read_arrays,
    read_description,
)

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"format_version": int, **ORIGIN, "config": {"setting": ("lora",)}},
    "adapter": {"format_version": int, **ORIGIN, "config": {"setting": ("adapter",), "rank": int}},
}
"""The keys of plugin_config.json; the rest of a LoRA's config is in adapter_config.json."""

MODULES = {
    path.split("/")[-2]: "base_model.model." + name.removesuffix(".weight")
    for name, (path, _) in TABLE.items()
    if path.startswith("blocks/") and path.endswith("/kernel")
}
"""Target -> its module in PEFT's names, `{}` being the block."""
_FACTORS = {"a": "lora_A.weight", "b": "lora_B.weight"}
_READ = ("peft_type", "r", "lora_alpha", "base_model_name_or_path")
_HARMLESS = (
    "auto_mapping", "inference_mode", "lora_dropout", "peft_version", "qalora_group_size", "revision", "task_type",
    "target_modules", "exclude_modules", "megatron_core", "layers_pattern", "runtime_config",
)  # fmt: skip
"""Keys of adapter_config.json that change nothing of what the tensors mean."""
_PLAIN_STARTS = (True, False, "gaussian")
"""Values of `init_lora_weights` under which the backbone stays as it was."""


class PeftPlugin(Trained[PeftConfig]):
    """A trained LoRA or Adapter: its parameters are those of `spa_jax.models.peft.init_peft`. Where PEFT trained it,
    fingerprint and template are empty."""

    def check(self, backbone: Backbone) -> None:
        """Refuses a backbone that this was not trained on, or does not fit.

        Raises:
            UserError: the fingerprints or the shapes differ.
        """
        if self.fingerprint:
            super().check(backbone)
        fresh = init_peft(self.config, backbone.config, abstract=True)
        expected = {name: leaf.shape for name, leaf in flatten_dict(fresh, sep=".").items()}
        found = {name: leaf.shape for name, leaf in flatten_dict(self.params, sep=".").items()}
        if wrong := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
            raise UserError(
                f"this '{self.config.setting}' does not fit the backbone '{backbone.name}': missing, extra or "
                f"misshapen {wrong}"
            )

    def save(self, directory: Path) -> None:
        config = self.config
        origin = {name: getattr(self, name) for name in ORIGIN}
        kept = {"setting": "lora"} if config.setting == "lora" else {"setting": "adapter", "rank": config.rank}
        with replaced_directory(directory) as new:
            if config.setting == "lora":
                safetensors.numpy.save_file(_to_peft(self.params), new / PEFT_WEIGHTS, {"format": "pt"})
                described = {
                    "peft_type": "LORA",
                    "task_type": "CAUSAL_LM",
                    "base_model_name_or_path": self.backbone,
                    "inference_mode": True,
                    "r": config.rank,
                    "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
                    "lora_dropout": 0.0,
                    "target_modules": [MODULES[name].rsplit(".", 1)[1] for name in config.targets],
                    "bias": "none",
                }
                write_json(new / PEFT_CONFIG, described)
            else:
                arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(self.params, sep=".").items()}
                safetensors.numpy.save_file(arrays, new / WEIGHTS)
            write_json(new / CONFIG, {"format_version": FORMAT_VERSION, "config": kept, **origin})


def load_trained(directory: Path) -> Plugin | PeftPlugin:
    """Reads the directory that a training run left, whatever its setting, or a LoRA that PEFT trained.

    Raises:
        UserError: nothing of that kind there, another format version, or a damaged file.
    """
    try:
        setting = read_json(directory / CONFIG)["config"]["setting"]
    except (OSError, ValueError, KeyError, TypeError):
        setting = None  # whatever is wrong, the reader says it
    if setting == "lora" or os.path.isfile(directory / PEFT_CONFIG):
        return load_lora(directory)
    return load_adapter(directory) if setting == "adapter" else load_plugin(directory)


def _to_peft(params: Params) -> dict[str, np.ndarray]:
    return {
        f"{MODULES[name].format(layer)}.{_FACTORS[factor]}": np.ascontiguousarray(matrix.T)
        for name, factors in params.items()
        for factor, leaf in factors.items()
        for layer, matrix in enumerate(np.asarray(leaf))
    }


def load_adapter(directory: Path) -> PeftPlugin:
    """Reads an Adapter; whether it fits is seen with the backbone.

    Raises:
        UserError: none there, another format version, or a damaged file.
    """
    described = read_description(directory / CONFIG, DESCRIPTIONS["adapter"])
    arrays = read_arrays(directory / WEIGHTS)
    params = unflatten_dict({name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}, sep=".")
    return PeftPlugin(PeftConfig(**described["config"]), params, *(described[name] for name in ORIGIN))


def load_lora(directory: Path) -> PeftPlugin:
    """Reads a LoRA in PEFT's format.

    Raises:
        UserError: a missing or damaged file, another kind of adapter, an option that is not supported, or tensors that
            are not those of a LoRA on all blocks of a LLaMA.
    """
    path = directory / PEFT_CONFIG
    try:
        described = read_json(path)
        kind, rank, alpha = described["peft_type"], described["r"], described["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: {error!r}") from error
    if kind != "LORA" or type(rank) is not int or rank < 1:
        raise UserError(f"'{path}' is of kind {kind!r} and rank {rank!r}; what can be read is a LORA of rank 1 or more")
    if type(alpha) not in (int, float) or not -sys.float_info.max <= alpha <= sys.float_info.max:
        raise UserError(f"'{path}' is damaged: lora_alpha is {alpha!r}, and must be a finite number")
    unsupported = {
        name: value
        for name, value in described.items()
        if name not in (*_READ, *_HARMLESS) and value not in (None, False, "none") and value != {} and value != []
    }
    if unsupported.get("init_lora_weights") in _PLAIN_STARTS:
        del unsupported["init_lora_weights"]
    if unsupported:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unsupported.items()))
        raise UserError(f"'{path}' asks for {listed}, which is not supported: train a LoRA without it")
    params = _from_peft(directory / PEFT_WEIGHTS)
    config = PeftConfig("lora", rank, float(alpha), tuple(params))
    if not (directory / CONFIG).exists():
        return PeftPlugin(config, params, str(described.get("base_model_name_or_path") or "unknown"), "", "")
    described = read_description(directory / CONFIG, DESCRIPTIONS["lora"])
    return PeftPlugin(config, params, *(described[name] for name in ORIGIN))


def _from_peft(path: Path) -> Params:
    """Reads the factors by target, stacked over layers; a tensor without a place stops the loading."""
    patterns = {
        name: re.compile(re.escape(module).replace(r"\{\}", r"(\d+)") + r"\.lora_(A|B)\.weight")
        for name, module in MODULES.items()
    }
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    unknown = []
    for tensor, array in read_arrays(path).items():
        matches = {name: match for name, pattern in patterns.items() if (match := pattern.fullmatch(tensor))}
        if not matches:
            unknown.append(tensor)
        for name, match in matches.items():
            found.setdefault(name, {"a": {}, "b": {}})[match[2].lower()][int(match[1])] = array.T
    if unknown or not found:
        raise UserError(f"'{path}' is no LoRA of a LLaMA: unknown tensors {sorted(unknown)}")
    layers = range(1 + max(layer for factors in found.values() for layer in factors["a"].keys() | factors["b"].keys()))
    missing = [
        f"{MODULES[name].format(layer)}.{_FACTORS[factor]}"
        for name, factors in found.items()
        for factor, of_layer in factors.items()
        for layer in layers
        if layer not in of_layer
    ]
    if missing:
        raise UserError(f"'{path}' lacks {', '.join(missing)}: a LoRA must be on all blocks")
    uneven = [
        f"{MODULES[name]}.{_FACTORS[factor]}"
        for name, factors in found.items()
        for factor, of_layer in factors.items()
        if len({matrix.shape for matrix in of_layer.values()}) > 1
    ]
    if uneven:
        raise UserError(f"'{path}': {', '.join(uneven)} is not of one shape in all blocks: train a LoRA of one rank")
    return {
        name: {
            factor: jnp.asarray(np.stack([of_layer[layer] for layer in layers]), jnp.float32)
            for factor, of_layer in found[name].items()
        }
        for name in TARGETS
        if name in found
    }
