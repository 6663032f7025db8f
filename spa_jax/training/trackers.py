"""Where a run's metrics go beside metrics.jsonl: TensorBoard, and Weights & Biases."""

import dataclasses
import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from spa_jax.errors import UserError
from spa_jax.files import is_remote, read_json, write_json

TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Name of a tracker -> the library that it needs."""
WANDB_PROJECT = "spa_jax"
"""Project of runs where the environment variable WANDB_PROJECT names none."""


@runtime_checkable
class MetricWriter(Protocol):
    """Takes the metrics of a run, step by step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""

    def flush(self) -> None:
        """Writes what is not on disk yet."""

    def close(self) -> None:
        """Writes all that is left; nothing is written after it."""


class TensorBoard:
    """Event files in the run's directory `tensorboard`, for `tensorboard --logdir=DIR`."""

    def __init__(self, workdir: Path, resumed_at: int) -> None:
        """Opens a new file; TensorBoard then hides what older files say of later steps.

        Args:
            workdir: of the run.
            resumed_at: step from which the run goes on.

        Raises:
            UserError: the directory cannot be written.
        """
        from tensorboardX import SummaryWriter

        # Files are named by the second, and one of the same second would be overwritten.
        name = {"logdir": str(workdir / "tensorboard"), "filename_suffix": f".{resumed_at:08d}"}
        try:
            self._writer = SummaryWriter(**name, purge_step=resumed_at + 1)
        except OSError as error:
            raise UserError(f"cannot write '{workdir / 'tensorboard'}': {error.strerror or error}") from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes what is not on disk yet."""
        self._writer.flush()

    def close(self) -> None:
        """Writes all that is left and closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; one run however often the training is resumed.

    Its id is kept in the run's directory as wandb.json. `WANDB_MODE=offline` writes files for `wandb sync` instead.
    """

    def __init__(self, workdir: Path, config: Any) -> None:
        """Starts or resumes the run.

        Args:
            workdir: of the run.
            config: dataclass that is shown as the run's config.

        Raises:
            UserError: wandb refuses, for instance since nobody is logged in, or wandb.json is damaged.
        """
        import wandb

        kept = workdir / "wandb.json"
        try:
            run_id = str(read_json(kept)["id"])
        except FileNotFoundError:
            run_id = uuid.uuid4().hex[:8]
            write_json(kept, {"id": run_id})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{kept}' is damaged ({error}): delete it, and the run gets a new id") from error
        try:
            self._run = wandb.init(
                project=wandb.setup().settings.project or WANDB_PROJECT,
                id=run_id,
                name=workdir.name,
                dir=str(workdir),
                config=dataclasses.asdict(config),
                resume="allow",
            )
        except (wandb.Error, OSError, ValueError) as error:  # ValueError: an environment variable that is none of its
            reason = " ".join(str(error).split())
            raise UserError(f"wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline") from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step; of one that the run has had before it keeps the older ones, which are equal."""
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Does nothing: wandb writes in a process of its own."""

    def close(self) -> None:
        """Waits until all is written or sent."""
        self._run.finish()


def check_trackers(names: Sequence[str], workdir: Path) -> None:
    """Checks before a run that its trackers can be opened.

    Args:
        names: some of TRACKERS.
        workdir: of the run.

    Raises:
        UserError: there is no such tracker, its library is not installed, or the run is in a bucket.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker '{name}'; trackers are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise UserError(f"the tracker '{name}' needs {TRACKERS[name]}: pip install 'spa_jax[trackers]'")
    if names and is_remote(workdir):
        raise UserError(f"trackers write to a local directory, and '{workdir}' is none: leave --tracker out")


def open_trackers(names: Sequence[str], workdir: Path, config: Any, resumed_at: int) -> list[MetricWriter]:
    """Opens the trackers of a run, each once.

    Args:
        names: some of TRACKERS.
        workdir: of the run.
        config: dataclass with its settings.
        resumed_at: step from which the run goes on.

    Raises:
        UserError: wandb refuses, or a file cannot be written.
    """
    opened: list[MetricWriter] = []
    for name in dict.fromkeys(names):
        opened.append(TensorBoard(workdir, resumed_at) if name == "tensorboard" else WeightsAndBiases(workdir, config))
    return opened
