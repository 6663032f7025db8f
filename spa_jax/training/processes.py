"""Several processes that train as one: each holds some of the devices, and all run the same programs in the same order.

One of them, the first, writes what all of them know; checkpoints and tap caches are written by all, into one directory.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """`distributed.*`: whether this process is one of several, and how they find each other.

    Attributes:
        enabled: whether it is. On Cloud TPU, under SLURM, Open MPI and on Kubernetes, JAX finds the others by itself.
        coordinator: elsewhere, `host:port` of the first process, which has to be reached by all.
        processes: with a coordinator, how many there are.
        process: with a coordinator, which this is, from 0.
        heartbeat_seconds: without a sign of life for so long a process counts as gone, and the others end.
    """

    enabled: bool
    coordinator: str
    processes: int
    process: int
    heartbeat_seconds: int


class Preempted(UserError):
    """The machine is about to be taken away, and the run is saved."""

    status = 75
    """Of the process: EX_TEMPFAIL, so that whoever started it knows to start it again."""


def init_distributed(config: DistributedConfig) -> None:
    """Meets the other processes; JAX must not have been used before.

    Raises:
        UserError: they cannot be found or reached.
    """
    if not config.enabled or jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {"heartbeat_timeout_seconds": config.heartbeat_seconds}
    if config.coordinator:
        given |= {
            "coordinator_address": config.coordinator, "num_processes": config.processes, "process_id": config.process
        }  # fmt: skip
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({error}): where JAX does not find them by itself, give "
            "distributed.coordinator=HOST:PORT, distributed.processes and distributed.process; alone, set "
            "distributed.enabled=false"
        ) from error


def is_main_process() -> bool:
    """Whether this process writes what all of them know."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Goes on when all processes are there; what was written before can then be read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """While this lasts, the end of another process is an error that says so.

    Raises:
        UserError: another process is gone.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise UserError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on without the others "
            f"({str(error).splitlines()[0]}): start all of them again, and the run goes on from its last checkpoint"
        ) from error


class PreemptionNotice:
    """Of preemption: asked once a step, whether all processes shall save and end after it.

    Alone a process learns of it by SIGTERM. Several ask JAX, which lets all of them end after the same step whichever
    gets the signal. While this is in use SIGTERM does not end the process.
    """

    def __init__(self) -> None:
        self._given = False

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._given

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while this lasts."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._give)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _give(self, *_: Any) -> None:
        self._given = True
