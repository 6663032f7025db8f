"""Reports of a training run: metrics.jsonl, and a progress bar on a terminal."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator

import jax

from spa_jax.errors import UserError
from spa_jax.training.metrics_file import MetricsFile
from spa_jax.training.outcomes import Sums, mean_metrics
from spa_jax.training.progress import progress_bar

log = logging.getLogger(__name__)


class TrainingLog:
    """Reports steps and evaluations; a step's sums are fetched when the next step is under way, so that the device
    never waits for the host."""

    def __init__(self, file: MetricsFile, setting: str, steps: int, log_every: int) -> None:
        """Args:
        file: where the metrics go.
        setting: of the run, for the name of its loss.
        steps: of the whole run.
        log_every: steps between two lines in the file.
        """
        self._file, self._setting, self._steps, self._log_every = file, setting, steps, log_every
        self._bar = progress_bar(loss="loss", usage="consulted", rate="tokens/s")
        self._pending: tuple[int, Sums, float] | None = None
        self.tokens = 0.0
        """Target tokens of the steps reported so far."""

    @contextlib.contextmanager
    def shown(self, completed: int) -> Iterator[None]:
        """Shows the progress bar, with so many steps done already."""
        with self._bar:
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
        """Reports the newest step, once it is computed, and has all lines on disk.

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
        self._file.write(step, metrics)
        self._file.flush()
        log.info(
            "step %d of %d: held-out loss %.3f (base %.3f), consulted %.2f", step, self._steps,
            metrics[f"eval/loss/{self._setting}"], metrics["eval/loss/base"], metrics["eval/router/usage"],
        )  # fmt: skip

    def close(self) -> None:
        """Reports the newest step and writes the file, where it is not evaluated."""
        self.flush()
        self._file.flush()

    def _report(self, step: int, sums: Sums, began: float) -> None:
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        self.tokens += values["tokens"]
        rate = values["tokens"] / (time.perf_counter() - began)
        metrics = {f"train/{name}": value for name, value in mean_metrics(values, self._setting).items()}
        metrics |= {"train/gradient_norm": values["gradient_norm"], "tokens/per_second": rate}
        loss, usage = metrics[f"train/loss/{self._setting}"], metrics["train/router/usage"]
        _check_finite(step, loss, values["gradient_norm"])
        if step % self._log_every == 0 or step == self._steps:
            self._file.write(step, metrics)
        self._bar.update(self._task, loss=f"{loss:.3f}", usage=f"{usage:.2f}", rate=f"{rate:,.0f}")


def _check_finite(step: int, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"the loss or its gradient is no longer a number at step {step}: lower optimizer.learning_rate or set "
            "optimizer.clip_norm; the last checkpoint is kept"
        )
