"""A training run from its config to the files it leaves: data, backbone, features, loop, plugin and summary."""

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spa_jax.data.pipeline import padded_shapes, plan_batches
from spa_jax.data.row_formats import write_pairs
from spa_jax.files import write_json
from spa_jax.models.llama import Params
from spa_jax.models.plugin import count_params
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.config import RunConfig
from spa_jax.training.loop import TrainingLoop
from spa_jax.training.methods import recipe_from_config
from spa_jax.training.metrics_file import MetricsFile
from spa_jax.training.optimizer import make_optimizer
from spa_jax.training.outcomes import Sums
from spa_jax.training.processes import barrier, explain_lost_process, init_distributed, is_main_process
from spa_jax.training.rows import load_pairs, make_encoder
from spa_jax.training.scorer import Scorer
from spa_jax.training.sharding import MeshPartitioner, make_mesh
from spa_jax.training.sources import load_batches
from spa_jax.training.step import TrainState, init_state, train_step
from spa_jax.training.trackers import MetricWriter, check_trackers, open_trackers
from spa_jax.training.training_log import TrainingLog
from spa_jax.training.workdir import check_writable, open_workdir, read_timing
from spa_jax.weights.registry import load_backbone

log = logging.getLogger(__name__)


def train(config: RunConfig, workdir: Path, trackers: Sequence[str] = ()) -> dict[str, float]:
    """Runs or resumes a training, alone or with other processes, and returns what summary.json says.

    Args:
        config: of the run.
        workdir: directory of the run.
        trackers: names of `spa_jax.training.trackers` that get the metrics too.

    Raises:
        UserError: anything in config, data, backbone, workdir or trackers that the user can mend.
        Preempted: the machine is about to be taken away, and the run is saved.
    """
    init_distributed(config.distributed)
    with explain_lost_process():
        return _train(config, workdir, trackers)


def _train(config: RunConfig, workdir: Path, trackers: Sequence[str]) -> dict[str, float]:
    check_trackers(trackers, workdir)
    check_writable(workdir)
    options = config.train
    pairs = load_pairs(config.data, config.seed)
    partitioner = MeshPartitioner(make_mesh(config.mesh, options.batch_size // options.accumulate))
    partitioner.check_batch(options.batch_size, options.accumulate)
    backbone = load_backbone(config.backbone, config.dtype, partitioner, config.compute)
    encoder = make_encoder(backbone, config.data)
    (examples, cut), (held_out, held_out_cut) = (encoder.encode_all(split) for split in pairs)
    log.info("%d training and %d held-out examples", len(examples), len(held_out))
    if cut or held_out_cut:
        log.warning(
            "%d training and %d held-out sources were longer than %s allows and cut at their end",
            cut, held_out_cut, encoder.limit,
        )  # fmt: skip

    recipe = recipe_from_config(config, backbone.config)
    model, frozen = recipe.model(backbone), backbone.params
    source, scoring_source = recipe.sources(backbone, model, config.tap_cache, options.batch_size, examples + held_out)
    open_workdir(workdir, config, backbone, (examples, held_out))
    if is_main_process() and not (config.data.task or config.data.eval):
        write_pairs(workdir / "held_out.jsonl", pairs[1])
    passes = {"data/backbone_passes": len(source.missing(examples + held_out))} if source.cached else {}
    source.fill(examples + held_out)
    if scoring_source is not source:
        scoring_source.fill(held_out)
    scorer = Scorer(backbone, recipe, held_out, options.batch_size, source=scoring_source)

    epoch = plan_batches(examples, options.batch_size, config.seed)
    steps = len(epoch) * options.epochs
    optimizer = make_optimizer(config.optimizer, steps)
    fresh = partitioner.place(init_state(recipe.init_params(backbone), optimizer))
    compiled_step = functools.partial(train_step, recipe, model, optimizer, options.accumulate)

    def take_step(state: TrainState, batch: Any) -> tuple[TrainState, Sums]:
        return compiled_step(state, frozen, partitioner.shard_batch(batch))

    def evaluate(params: Params) -> dict[str, float]:
        return scorer.metrics(*scorer.outcomes_within(params, config.router.budget))

    timing, selector = read_timing(workdir), f"loss/{config.setting}"
    with contextlib.closing(Checkpoints(workdir / "checkpoints", selector)) as checkpoints:
        state = checkpoints.restore(fresh) or fresh
        start = int(state.step)
        if start:
            log.info("resuming at step %d of %d", start, steps)
        if start < steps:
            shapes = len(set(padded_shapes(examples, options.batch_size)))
            log.info("%d steps in batches of %d shapes, for each of which a program is compiled first", steps, shapes)
            writers: list[MetricWriter] = [MetricsFile(workdir / "metrics.jsonl", start)]
            if is_main_process():
                writers += open_trackers(trackers, workdir, config, start)
            training_log = TrainingLog(writers, config.setting, steps, options.log_every)
            eval_every = options.eval_every or len(epoch)
            loop = TrainingLoop(
                steps, eval_every, config.seed, selector, take_step, evaluate, checkpoints, training_log
            )
            left = epoch.repeat(options.epochs)[start:steps]
            began = time.perf_counter()
            state = loop.run(state, (b for _, b in load_batches(left, partitioner, source.collate, examples)))
            seconds = time.perf_counter() - began
            timing = {
                "train/steps": float(steps - start),
                "time/train_seconds": seconds,
                "tokens/per_second": training_log.tokens / seconds,
                **passes,
            }
        best = checkpoints.restore(state, best=True)

    params = recipe.method_params((best or state).params)
    outcomes, threshold = scorer.outcomes_within(params, config.router.budget)
    trainable = count_params(params)
    summary = {
        **scorer.metrics(outcomes, threshold),
        "router/threshold": threshold,
        "params/trainable": trainable,
        "params/trainable_percent": 100 * trainable / backbone.config.num_params,
        "data/train_examples": len(examples),
        "data/train_questions": sum(len(pair.learnt_turns) for pair in pairs[0]),
        "data/held_out_examples": len(held_out),
        "data/sources_cut": cut + held_out_cut,
        **timing,
    }
    params = partitioner.to_host(params)
    if is_main_process():
        trained = recipe.trained(threshold, params, backbone, encoder.template, encoder.date)
        trained.save(workdir / "plugin")
        write_json(workdir / "summary.json", summary)
    barrier("the run is written")
    return summary
