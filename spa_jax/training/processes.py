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
        enabled: whether this process is one of several. On Cloud TPU, under SLURM, Open MPI and on Kubernetes, JAX
            finds the others by itself.
        coordinator: elsewhere, `host:port` of the first process, which has to be reached by all.
        processes: with a coordinator, how many there are.
        process: with a coordinator, which this is, from 0.
        heartbeat_seconds: without a sign of life for so long a process counts as gone, and the others end.
    """

    enabled: bool = False
    coordinator: str = ""
    processes: int = 0
    process: int = -1
    heartbeat_seconds: int = 100


class Preempted(UserError):
    """The machine is about to be taken away, and the run is saved."""

    status = 75
    """Exit status EX_TEMPFAIL, so that whoever started the process knows to start it again."""


def init_distributed(config: DistributedConfig) -> None:
    """Connects to the other processes; JAX must not have been used before.

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
    """Tells whether this process is the one that writes what all of them know."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Waits until all processes have reached this barrier; what any of them wrote before can then be read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turns JAX's error about a lost process into one that a user understands, within a `with` block.

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
    """Notice that the machine is about to be taken away: called once a step, it tells whether all processes are to save
    and end after that step.

    A single process learns of it by SIGTERM, which does not end the process while it is `listening`. Several processes
    ask JAX, which lets all of them end after the same step, whichever gets the signal.
    """

    def __init__(self) -> None:
        self._received = False

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches SIGTERM within a `with` block."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive(self, *_: Any) -> None:
        self._received = True
