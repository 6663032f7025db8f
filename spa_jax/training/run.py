"""A training run from its config to the files it leaves: data, backbone, tap cache, loop, plugin and summary."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import collate, plan_batches
from spa_jax.errors import UserError
from spa_jax.files import is_remote, write_json
from spa_jax.models.combine import Setting
from spa_jax.models.llama import Llama, Params
from spa_jax.models.peft import PEFT_SETTINGS, PeftConfig, init_peft
from spa_jax.models.plugin import PluginConfig, count_params, init_plugin, select_taps
from spa_jax.models.pruning import prune
from spa_jax.models.side import SideConfig
from spa_jax.training import loop
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.config import RunConfig, TapCacheConfig
from spa_jax.training.evaluation import Evaluator
from spa_jax.training.objective import FOLDS
from spa_jax.training.optimizer import optimizer
from spa_jax.training.processes import barrier, explain_lost_process, init_distributed, is_main_process
from spa_jax.training.rows import load_pairs, make_encoder
from spa_jax.training.sharding import MeshPartitioner, make_mesh
from spa_jax.training.step import init_state, make_eval_step, make_train_step
from spa_jax.training.tap_cache import FeatureSpec, TapCache
from spa_jax.training.through import scoring
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import PeftPlugin, save_peft
from spa_jax.weights.plugin import Plugin, save_plugin
from spa_jax.weights.registry import cache_directory, load_backbone

log = logging.getLogger(__name__)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def plugin_config(config: RunConfig, backbone: Backbone) -> PluginConfig:
    """The plugin a run of `spa`, `s1`, `s2` or `s3` trains."""
    side = SideConfig(
        config.side.kind, config.side.width, select_taps(config.side.taps, backbone.config), config.side.heads
    )
    setting = cast(Setting, config.setting)
    return PluginConfig(setting, side, backbone.config.hidden_size, config.router.threshold, config.router.offset)


def peft_config(config: RunConfig) -> PeftConfig:
    """What a run of `lora` or `adapter` trains."""
    options = config.peft
    if config.setting == "lora":
        return PeftConfig("lora", options.rank, options.alpha, tuple(options.targets.split(",")))
    return PeftConfig("adapter", options.width)


def trained_config(config: RunConfig, backbone: Backbone) -> PluginConfig | PeftConfig:
    """What a run of any setting trains."""
    return peft_config(config) if config.setting in PEFT_SETTINGS else plugin_config(config, backbone)


def open_workdir(workdir: Path, config: RunConfig, backbone: Backbone, splits: Sequence[list[Example]]) -> None:
    """Creates the run's directory and its config.json, or checks that the run there is this one.

    Raises:
        UserError: not writable, or the directory holds a run of another config, backbone or data.
    """
    path = workdir / "config.json"
    barrier("the workdir is not written yet")
    digests = json.dumps([[example.digest for example in split] for split in splits])
    data = hashlib.sha256(digests.encode()).hexdigest()[:32]
    resolved = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            before, fingerprint, data_before = old["config"], old["backbone_fingerprint"], old["data_fingerprint"]
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


def backbone_model(config: RunConfig, plugin: PluginConfig | PeftConfig, backbone: Backbone) -> Llama:
    """The backbone with what a run needs of it."""
    return backbone.model((), config.peft.remat) if isinstance(plugin, PeftConfig) else backbone.model(plugin.side.taps)


def trainable_params(config: RunConfig, plugin: PluginConfig | PeftConfig, backbone: Backbone) -> Params:
    """What the optimizer changes: the plugin, and with cross-fitting the side networks of the folds, stacked."""
    if isinstance(plugin, PeftConfig):
        return init_peft(plugin, backbone.config, config.seed)

    def init(seed: int) -> Params:
        params = init_plugin(plugin, seed, random_router=config.router.objective != "improvement")
        if config.side.init == "pruned":
            params["side"] = prune(plugin.side, backbone.config, backbone.params, params["side"])
        return params

    params = init(config.seed)
    if config.router.cross_fit:
        others = [init(config.seed + 1 + fold)["side"] for fold in range(FOLDS)]
        params["folds"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
    return params


def open_tap_cache(
    options: TapCacheConfig, plugin: PluginConfig, backbone: Backbone, examples: Sequence[Example]
) -> TapCache:
    """The tap cache of a plugin's examples, with room checked; nothing is computed yet."""
    if "://" in options.directory:
        raise UserError(
            f"tap_cache.directory='{options.directory}' is in a bucket, and a tap cache is read in random order: "
            "name a directory that all processes share (a network file system), or set tap_cache.enabled=false"
        )
    root = Path(options.directory or cache_directory() / "taps")
    side, dtype = plugin.side, backbone.dtype.name
    cache = TapCache(root, FeatureSpec(backbone.identity, side.taps, plugin.hidden_size, dtype, side.attends))
    cache.check_room(examples, options.limit_gib)
    return cache


def _own_rows(partitioner: MeshPartitioner, source: loop.Collate) -> loop.Collate:
    return lambda examples, rows: loop.own_part(partitioner, source, examples, rows)[1]


def _on_mesh(
    partitioner: MeshPartitioner, step: Callable[[Any, Params, Any], Any]
) -> Callable[[Any, Params, Any], Any]:
    """A step of batches that the host holds."""
    return lambda state, frozen, batch: step(state, frozen, partitioner.shard_batch(batch))


def _last_timing(workdir: Path) -> dict[str, float]:
    """The timing in summary.json, for a run that has nothing left to do."""
    try:
        summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        return {name: summary[name] for name in (*loop.TIMING, "data/backbone_passes") if name in summary}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def train(config: RunConfig, workdir: Path) -> dict[str, float]:
    """Runs or resumes a training, alone or with other processes, and returns what summary.json says.

    Raises:
        UserError: anything in config, data, backbone or workdir that the user can mend.
        Preempted: the machine is about to be taken away, and the run is saved.
    """
    init_distributed(config.distributed)
    with explain_lost_process():
        return _train(config, workdir)


def _train(config: RunConfig, workdir: Path) -> dict[str, float]:
    if not is_remote(workdir) and workdir.exists() and not (workdir.is_dir() and os.access(workdir, os.W_OK)):
        raise UserError(f"cannot write the workdir '{workdir}'")
    pairs = load_pairs(config.data, config.seed)
    partitioner = MeshPartitioner(make_mesh(config.mesh, config.train.batch_size // config.train.accumulate))
    partitioner.check_batch(config.train.batch_size, config.train.accumulate)
    backbone = load_backbone(config.backbone, config.dtype, partitioner, config.compute)
    encoder = make_encoder(backbone, config.data)
    (examples, cut), (held_out, cut_held_out) = (encoder.encode_all(split) for split in pairs)
    log.info("%d training and %d held-out examples", len(examples), len(held_out))
    if cut or cut_held_out:
        log.warning(
            "%d training and %d held-out sources were longer than data.max_length=%d allows and cut at their end",
            cut, cut_held_out, encoder.max_length,
        )  # fmt: skip
    plugin = trained_config(config, backbone)
    every = examples + held_out
    cache = None
    if isinstance(plugin, PeftConfig):
        log.info("'%s' trains through the backbone, which is run at every step: no tap cache", config.setting)
    elif config.tap_cache.enabled:
        cache = open_tap_cache(config.tap_cache, plugin, backbone, every)
    open_workdir(workdir, config, backbone, (examples, held_out))

    model = backbone_model(config, plugin, backbone)
    frozen = backbone.params
    source: loop.Collate = collate
    passes: dict[str, float] = {}
    if cache is not None:
        passes = {"data/backbone_passes": len(cache.missing(every))}
        loop.fill_cache(cache, model, frozen, config.train.batch_size, every)
        source = cache.collate
    source = held_out_source = _own_rows(partitioner, source)
    if isinstance(plugin, PeftConfig):
        scored = scoring(loop.run_backbone(model, frozen, config.train.batch_size, held_out))
        held_out_source = _own_rows(partitioner, scored)

    steps = len(plan_batches(examples, config.train.batch_size, config.seed)) * config.train.epochs
    tx = optimizer(config.optimizer, steps)
    fresh = partitioner.place(init_state(trainable_params(config, plugin, backbone), tx))
    train_step = _on_mesh(partitioner, make_train_step(plugin, config.router, model, tx, config.train.accumulate))
    eval_step = _on_mesh(partitioner, make_eval_step(plugin, model))
    evaluate = Evaluator(
        eval_step, frozen, held_out, held_out_source, config.train.batch_size,
        config.setting, plugin.threshold, config.router.budget,
    )  # fmt: skip
    timing = _last_timing(workdir)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", f"loss/{config.setting}")) as checkpoints:
        state = checkpoints.restore(fresh) or fresh
        if int(state.step):
            log.info("resuming at step %d of %d", int(state.step), steps)
        if int(state.step) < steps:
            metrics_path = workdir / "metrics.jsonl"
            state, timing = loop.train(
                config, state, frozen, examples, source, train_step, evaluate, checkpoints, metrics_path
            )
            timing |= passes
        best = checkpoints.restore(state, best=True)
    params = {name: leaves for name, leaves in (best or state).params.items() if name != "folds"}
    if isinstance(plugin, PluginConfig):
        plugin = dataclasses.replace(plugin, threshold=evaluate.threshold_of(evaluate.outcomes(params)))
    trainable, total = count_params(params), backbone.config.num_params
    summary = {
        **evaluate(params),
        "router/threshold": plugin.threshold,
        "params/trainable": trainable,
        "params/trainable_percent": 100 * trainable / total,
        "data/train_examples": len(examples),
        "data/train_questions": sum(len(pair.turns) for pair in pairs[0]),
        "data/held_out_examples": len(held_out),
        "data/sources_cut": cut + cut_held_out,
        **timing,
    }
    params = partitioner.to_host(params)
    if is_main_process():
        origin = (backbone.name, backbone.fingerprint, encoder.template)
        if isinstance(plugin, PeftConfig):
            save_peft(workdir / "plugin", PeftPlugin(plugin, params, *origin))
        else:
            save_plugin(workdir / "plugin", Plugin(plugin, params, *origin))
        write_json(workdir / "summary.json", summary)
    barrier("the run is written")
    return summary
