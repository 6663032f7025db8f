"""Trains one plugin for each row of a table and measures it on test data: the common part of `sciq` and `coqa`."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from spa_jax.training.evaluation import Evaluator, threshold_for

from configs import default
from spa_jax.data.pairs import Pair, read_json_lines
from spa_jax.errors import UserError
from spa_jax.files import write_bytes, write_json
from spa_jax.models.plugin import PluginConfig, count_params, init_plugin
from spa_jax.training import loop
from spa_jax.training.config import RunConfig, parse
from spa_jax.training.rows import make_encoder
from spa_jax.training.run import open_tap_cache, plugin_config, train
from spa_jax.training.step import make_eval_step
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import load_backbone

SHARE = 0.62
"""The paper's consulted share (31 exchanges for 50 tokens)."""
COLUMNS = ("loss/base", "loss/plugin", "router/usage", "loss/at 0.62", "loss/always", "loss/oracle", "oracle/usage")

Keys = Mapping[str, Any]


def run_rows(table: Mapping[str, Keys], fixed: Keys, workdir: Path, output: Path, only: str, command: str) -> None:
    """Runs the rows whose name holds `only` and that are not done yet; prints and writes all that are done.

    Args:
        table: name of each row -> config keys it sets; a `side.width` of 0 stands for the width that makes the plugin
            as large as the default one (within 10 %).
        fixed: config keys of all rows.
        workdir: holds `data/{train,validation,test}.jsonl`; gets a run a row.
        output: where the JSON goes.
        only: part of a name.
        command: for the record.
    """
    backbone = load_backbone(default.get_config().backbone)
    data = workdir / "data"
    fixed = {"data.train": str(data / "train.jsonl"), "data.eval": str(data / "validation.jsonl"), **fixed}
    reference = size_of(_config(fixed), backbone)
    results = {}
    for name, keys in table.items():
        done = workdir / "rows" / f"{name}.json"
        if not done.exists() and only in name:
            config = _config({**fixed, **keys})
            if keys.get("side.width") == 0:
                config = matched(config, backbone, reference)
            summary = train(config, workdir / name)
            metrics = measure(config, workdir / name, backbone, data / "test.jsonl")
            kept = {key: summary[key] for key in ("params/trainable", "time/train_seconds", "router/threshold")}
            write_json(done, {"keys": {**keys, "side.width": config.side.width}, **metrics, **kept})
        if done.exists():
            results[name] = json.loads(done.read_text(encoding="utf-8"))
    shown = Table("row", "parameters", *COLUMNS)
    for name, row in results.items():
        shown.add_row(name, f"{row['params/trainable']:,}", *(f"{row[c]:.3f}" if c in row else "" for c in COLUMNS))
    Console(width=160).print(shown)
    write_json(output, {"command": command, "hardware": hardware(), "fixed": _portable(fixed), "rows": results})


def hardware() -> str:
    """What a measurement was made on."""
    device = jax.devices()[0]
    where = "cpu" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"
    return f"{os.cpu_count()} CPU cores ({_processor()}), {where}"


def _processor() -> str:
    """Its name where Linux tells it, with its vectors, which decide what a core can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    told = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    vectors = {"avx512f": "AVX-512", "avx2": "AVX2"}
    flags = told.get("flags", "").split()
    found = [vectors[flag] for flag in vectors if flag in flags]
    return ", ".join([told.get("model name", platform.machine()), *found[:1]])


def write_splits(name: str, data: str | None, read: Callable[[Path], list[Pair]], workdir: Path) -> None:
    """A data set's splits as `workdir/data/SPLIT.jsonl` of `{"source", "target"}`, for `run_rows`.

    Raises:
        UserError: no directory is named.
    """
    if data is None:
        raise UserError(f"name {name}'s directory with --data=DIR")
    for split in ("train", "validation", "test"):
        pairs = read(Path(data) / f"{split}.jsonl")
        lines = [json.dumps({"source": pair.source, "target": pair.target}) for pair in pairs]
        write_bytes(workdir / "data" / f"{split}.jsonl", "\n".join(lines).encode())


def measure(config: RunConfig, workdir: Path, backbone: Backbone, test: Path) -> dict[str, float]:
    """Test metrics of a run's plugin at its own threshold and, with a router, at a consulted share of `SHARE`.

    `oracle/usage` is the share a perfect router asks for: that of the tokens where asking lowers the loss.
    """
    plugin = load_plugin(workdir / "plugin")
    model = backbone.model(plugin.config.side.taps)
    examples, _ = make_encoder(backbone, config.data).encode_all(read_json_lines(str(test)))
    cache = open_tap_cache(config.tap_cache, plugin.config, backbone, examples)
    loop.fill_cache(cache, model, backbone.params, config.train.batch_size, examples)
    step = make_eval_step(plugin.config, model)
    evaluate = Evaluator(
        step, backbone.params, examples, cache.collate, config.train.batch_size, "plugin", plugin.config.threshold
    )
    outcomes = evaluate.outcomes(plugin.params)
    metrics = evaluate(plugin.params)
    if plugin.config.routed:
        sigma = np.asarray(outcomes.probability) > threshold_for(np.asarray(outcomes.probability), SHARE)
        metrics["loss/at 0.62"] = float(np.where(sigma, outcomes.always, outcomes.skipped).mean())
        metrics["oracle/usage"] = float(np.mean(np.asarray(outcomes.always) < np.asarray(outcomes.skipped)))
    return metrics


def matched(config: RunConfig, backbone: Backbone, size: int) -> RunConfig:
    """The config with the side width whose number of parameters is nearest `size`."""
    step = 2 * config.side.heads if config.side.kind == "transformer" else 1
    widths = range(step, 257, step)
    candidates = [dataclasses.replace(config, side=dataclasses.replace(config.side, width=width)) for width in widths]
    return min(candidates, key=lambda candidate: abs(size_of(candidate, backbone) - size))


def size_of(config: RunConfig, backbone: Backbone) -> int:
    """Trainable parameters."""
    plugin: PluginConfig = plugin_config(config, backbone)
    return count_params(init_plugin(plugin, abstract=True))


def _config(keys: Keys) -> RunConfig:
    config = default.get_config()
    config.update_from_flattened_dict({**keys, "side.width": keys.get("side.width") or 32})
    return parse(config.to_dict())


def _portable(keys: Keys) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in ("data.train", "data.eval")}
