"""The training loop: steps, evaluation, checkpoints and reports of one run."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import collate, padded_shape, plan_batches, prefetched
from spa_jax.errors import UserError
from spa_jax.files import is_remote, write_bytes
from spa_jax.models.llama import Llama, Params
from spa_jax.models.partitioner import Partitioner
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.config import RunConfig
from spa_jax.training.evaluation import Evaluator
from spa_jax.training.features import Features, extract, run_prefix
from spa_jax.training.objective import means
from spa_jax.training.processes import Preempted, PreemptionNotice, barrier, is_main_process
from spa_jax.training.step import TrainState
from spa_jax.training.tap_cache import TapCache

log = logging.getLogger(__name__)

TIMING = ("train/steps", "time/train_seconds", "tokens/per_second")

Rows = np.ndarray
Collate = Callable[..., Any]  # of (examples, rows[, shape]), see `pipeline.collate`
TrainStep = Callable[[TrainState, Params, Any], tuple[TrainState, dict[str, jax.Array]]]


def progress_bar(**columns: str) -> Progress:
    """A bar with count, time left and the given fields, drawn on a terminal only."""
    fields = [TextColumn(f"{label} {{task.fields[{name}]}}") for name, label in columns.items()]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *fields,
        TimeRemainingColumn(),
        transient=True,
        disable=not rich.get_console().is_terminal,
    )


def run_backbone(
    model: Llama, frozen: Params, batch_size: int, examples: Sequence[Example], everywhere: bool = False
) -> Iterator[tuple[int, Features]]:
    """Features of each example alone, as `(index, features of that row as NumPy arrays)`, one batch after another; of
    several processes each gets those of its own rows.

    Tokens that all examples begin with, such as a chat's system prompt, are run once.
    """
    program = jax.jit(extract, static_argnums=(0, 3))
    prefix, common = None, common_prefix(examples)
    if len(common):
        prefix = jax.jit(run_prefix, static_argnums=0)(model, frozen, common[None, :])
    steps = plan_batches(examples, batch_size)
    batches = prefetched(steps.map(lambda rows: own_part(model.partitioner, collate, examples, rows)))
    pending = None
    with progress_bar() as bar:
        for rows, batch in bar.track(_and_none(batches), total=len(steps), description="backbone pass"):
            dispatched = None
            if batch is not None:
                dispatched = rows, program(model, frozen, model.partitioner.shard_batch(batch), everywhere, prefix)
            if pending is not None:
                chosen, features = pending[0], model.partitioner.to_local(pending[1])
                for i, row in enumerate(chosen):
                    if row >= 0:
                        yield int(row), jax.tree.map(lambda leaf, i=i: leaf[i], features)
            pending = dispatched


def own_part(partitioner: Partitioner, source: Collate, examples: Sequence[Example], rows: Rows) -> tuple[Rows, Any]:
    """The rows of a batch that this process has to load, and what `source` makes of them."""
    own = rows[partitioner.local_rows(len(rows))]
    return own, source(examples, own, padded_shape(examples[rows[0]]))


def common_prefix(examples: Sequence[Example]) -> Rows:
    """The tokens that all examples begin with, none of which predicts a target; `[C]` int32."""
    if not examples:
        return np.array([], np.int32)
    first = examples[0].tokens
    length = min(int(example.predict[0]) for example in examples)
    for example in examples:
        differs = np.flatnonzero(example.tokens[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return first[:length]


def _and_none(batches: Iterator[tuple[Rows, Any]]) -> Iterator[tuple[Rows, Any]]:
    yield from batches
    yield np.array([], np.int32), None


def fill_cache(cache: TapCache, model: Llama, frozen: Params, batch_size: int, examples: Sequence[Example]) -> None:
    """Runs the backbone over the examples the cache does not hold; of several processes each keeps its own rows.

    Raises:
        UserError: several processes do not share the directory.
    """
    barrier("the tap cache is open")
    todo = cache.missing(examples)
    log.info("tap cache %s: %d examples to compute", cache.directory, len(todo))
    cache.build(todo, lambda missing: run_backbone(model, frozen, batch_size, missing, cache.spec.everywhere))
    barrier("the tap cache is built")
    cache.refresh()
    if cache.missing(examples):
        raise UserError(
            f"the processes do not see each other's part of the tap cache in '{cache.directory}': set "
            "tap_cache.directory to one that all of them share, or tap_cache.enabled=false"
        )


class MetricsFile:
    """metrics.jsonl: one JSON object a line; a resumed run drops what it is about to replay. In a bucket, where nothing
    can be appended, it is written by `flush`."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_at:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue
        if is_main_process():
            write_bytes(path, "".join(kept).encode())
        self._path, self._lines = path, kept

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not is_main_process():
            return
        line = json.dumps({"step": step, **metrics}) + "\n"
        if is_remote(self._path):
            self._lines.append(line)
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def flush(self) -> None:
        """All that was written is there when this returns."""
        if is_remote(self._path) and is_main_process():
            write_bytes(self._path, "".join(self._lines).encode())


def train(
    config: RunConfig,
    state: TrainState,
    frozen: Params,
    examples: Sequence[Example],
    collate_rows: Collate,
    train_step: TrainStep,
    evaluate: Evaluator,
    checkpoints: Checkpoints,
    metrics_path: Path,
) -> tuple[TrainState, dict[str, float]]:
    """Runs from the state's step to the end of the last epoch.

    Returns:
        The last state, and the `TIMING` of what ran now.

    Raises:
        UserError: the loss or its gradient is no longer a number; no checkpoint of that state is kept.
        Preempted: the machine is about to be taken away; the last step is saved.
    """
    start = int(state.step)
    epoch = plan_batches(examples, config.train.batch_size, config.seed)
    steps = len(epoch) * config.train.epochs
    eval_every = config.train.eval_every or len(epoch)
    file = MetricsFile(metrics_path, start)
    selector = f"loss/{config.setting}"
    tokens = 0.0

    def report(step: int, sums: Any, dispatched: float) -> None:
        nonlocal tokens
        values = jax.device_get(sums)
        tokens += float(values["tokens"])
        seconds = time.perf_counter() - dispatched
        metrics = {f"train/{name}": value for name, value in means(values, config.setting).items()}
        metrics |= {"train/gradient_norm": values["gradient_norm"], "tokens/per_second": values["tokens"] / seconds}
        metrics = {name: float(value) for name, value in metrics.items()}
        _check_finite(step, metrics[f"train/{selector}"], metrics["train/gradient_norm"])
        if step % config.train.log_every == 0 or step == steps:
            file.write(step, metrics)
        loss, usage = metrics[f"train/{selector}"], metrics["train/router/usage"]
        rate = metrics["tokens/per_second"]
        bar.update(task, loss=f"{loss:.3f}", usage=f"{usage:.2f}", rate=f"{rate:,.0f}")

    began = time.perf_counter()
    pending = None
    batches = prefetched(epoch.repeat(config.train.epochs)[start:steps].map(lambda rows: collate_rows(examples, rows)))
    columns, notice = progress_bar(loss="loss", usage="consulted", rate="tokens/s"), PreemptionNotice()
    with columns as bar, notice.listening():
        task = bar.add_task("training", total=steps, completed=start, loss="-", usage="-", rate="-")
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            dispatched = time.perf_counter()
            state, sums = train_step(state, frozen, batch)
            if pending is not None:
                report(*pending)
            pending = (step, sums, dispatched)
            bar.update(task, completed=step)
            if step % eval_every == 0 or step == steps:
                # All a step has to say is written before its checkpoint: a resumed run begins with the next step.
                report(*pending)
                pending = None
                metrics = {f"eval/{name}": value for name, value in evaluate(state.params).items()}
                _check_finite(step, metrics["eval/loss/always"])
                file.write(step, metrics)
                file.flush()
                checkpoints.save(state, config.seed, {selector: metrics[f"eval/{selector}"]})
                log.info(
                    "step %d of %d: held-out loss %.3f (base %.3f), consulted %.2f",
                    step, steps, metrics[f"eval/{selector}"], metrics["eval/loss/base"], metrics["eval/router/usage"],
                )  # fmt: skip
            if notice(step) and step < steps:
                if pending is not None:
                    report(*pending)
                    file.flush()
                    checkpoints.save(state, config.seed, {selector: math.inf})  # it is not evaluated
                raise Preempted(f"preempted after step {step} of {steps}, which is saved: the same command goes on")
    seconds = time.perf_counter() - began
    return state, dict(zip(TIMING, (float(steps - start), seconds, tokens / seconds), strict=True))


def _check_finite(step: int, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"the loss or its gradient is no longer a number at step {step}: lower optimizer.learning_rate or set "
            "optimizer.clip_norm; the last checkpoint is kept"
        )
