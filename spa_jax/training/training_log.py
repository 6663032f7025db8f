"""Reports of a training run: metrics.jsonl, trackers, and a progress bar on a terminal."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence

import jax

from spa_jax.errors import UserError
from spa_jax.training.outcomes import Sums, mean_metrics
from spa_jax.training.progress import progress_bar
from spa_jax.training.trackers import MetricWriter

log = logging.getLogger(__name__)


class TrainingLog:
    """Reports steps and evaluations; a step's sums are fetched when the next step is under way, so that the device
    never waits for the host."""

    def __init__(self, writers: Sequence[MetricWriter], setting: str, steps: int, log_every: int) -> None:
        """Args:
        writers: where the metrics go.
        setting: of the run, for the name of its loss.
        steps: of the whole run.
        log_every: steps between two that are written.
        """
        self._writers, self._setting, self._steps, self._log_every = writers, setting, steps, log_every
        self._bar = progress_bar(loss="loss", usage="consulted", rate="tokens/s")
        self._pending: tuple[int, Sums, float] | None = None
        self.tokens = 0.0
        """Target tokens of the steps reported so far."""

    @contextlib.contextmanager
    def shown(self, completed: int) -> Iterator[None]:
        """Shows the progress bar, with so many steps done already; closes what the metrics go to in the end."""
        with self._bar, contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
            self._task = self._bar.add_task(
                "training", total=self._steps, completed=completed, loss="-", usage="-", rate="-"
            )
            yield

    def step(self, step: int, sums: Sums, began: float) -> None:
        """Takes the sums of a step that was dispatched, which began at that time of `time.perf_counter`, and reports
        the one before it."""
        self.flush()
        self._pending = step, sums, began
        self._bar.update(self._task, completed=step)

    def flush(self) -> None:
        """Reports the newest step, once it is computed.

        Raises:
            UserError: the loss or its gradient is no longer a number.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._report(*pending)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Reports held-out metrics after a step.

        Raises:
            UserError: the loss is no longer a number.
        """
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        _check_finite(step, metrics["eval/loss/always"])
        self._write(step, metrics)
        self.save()
        log.info(
            "step %d of %d: held-out loss %.3f (base %.3f), consulted %.2f", step, self._steps,
            metrics[f"eval/loss/{self._setting}"], metrics["eval/loss/base"], metrics["eval/router/usage"],
        )  # fmt: skip

    def save(self) -> None:
        """Reports the newest step, and has all that was written on disk."""
        self.flush()
        for writer in self._writers:
            writer.flush()

    def _report(self, step: int, sums: Sums, began: float) -> None:
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        self.tokens += values["tokens"]
        rate = values["tokens"] / (time.perf_counter() - began)
        metrics = {f"train/{name}": value for name, value in mean_metrics(values, self._setting).items()}
        metrics |= {"train/gradient_norm": values["gradient_norm"], "tokens/per_second": rate}
        loss, usage = metrics[f"train/loss/{self._setting}"], metrics["train/router/usage"]
        _check_finite(step, loss, values["gradient_norm"])
        if step % self._log_every == 0 or step == self._steps:
            self._write(step, metrics)
        self._bar.update(self._task, loss=f"{loss:.3f}", usage=f"{usage:.2f}", rate=f"{rate:,.0f}")

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)


def _check_finite(step: int, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"the loss or its gradient is no longer a number at step {step}: lower optimizer.learning_rate or set "
            "optimizer.clip_norm; the last checkpoint is kept"
        )
