"""The last and the best state of a run, by Orbax; a save is there whole or not at all."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from spa_jax.errors import UserError
from spa_jax.files import is_remote
from spa_jax.training.step import TrainState


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back to the end of the block: one inside Orbax leaves it waiting for itself."""
    if threading.current_thread() is not threading.main_thread():  # has no signals, and may set no handler
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


class Checkpoints:
    """Checkpoints of one run, numbered by step. Data position and random state are the step and the seed."""

    @_uninterrupted()
    def __init__(self, directory: Path, best: str) -> None:
        """Opens or creates the directory; `best` names the metric whose smallest value marks the best state.

        Raises:
            UserError: it cannot be written, or what is there cannot be read.
        """
        newest = checkpoint_managers.LatestN(n=1)
        smallest = checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics[best], reverse=True, n=1)
        policy = checkpoint_managers.AnyPreservationPolicy([newest, smallest])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[best],
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        try:
            directory = directory if is_remote(directory) else directory.absolute()
            self._manager = ocp.CheckpointManager(directory, options=options)
        except Exception as error:  # Orbax raises many types for what is one thing to the user.
            raise UserError(
                f"cannot open the checkpoints '{directory}' ({_reason(error)}): choose another --workdir"
            ) from error

    @_uninterrupted()
    def save(self, state: TrainState, seed: int, metrics: dict[str, float]) -> None:
        """Saves in the background; the state is copied before this returns, so it may be donated afterwards."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        position = {"step": step, "seed": seed}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=args, metrics=metrics)

    @_uninterrupted()
    def restore(self, like: TrainState, *, best: bool = False) -> TrainState | None:
        """Restores the last (or best) state saved whole, in the shapes and dtypes of `like`; None where there is none.

        Raises:
            UserError: the checkpoint is damaged or of another plugin shape.
        """
        self._manager.wait_until_finished()
        step = self._manager.best_step() if best else self._manager.latest_step()
        if step is None:
            return None
        abstract: Any = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except Exception as error:  # as above
            where = self._manager.directory / str(step)
            raise UserError(
                f"cannot restore the checkpoint '{where}' ({_reason(error)}): delete that directory to use an earlier "
                "one, or choose another --workdir"
            ) from error
        return TrainState(**restored["state"])

    @_uninterrupted()
    def close(self) -> None:
        """Waits for the last save."""
        self._manager.close()


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
