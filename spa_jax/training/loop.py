"""The training loop: steps, and now and then an evaluation with a checkpoint."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from spa_jax.models.llama import Params
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.outcomes import Sums
from spa_jax.training.processes import Preempted, PreemptionNotice
from spa_jax.training.step import TrainState
from spa_jax.training.training_log import TrainingLog


@dataclasses.dataclass(frozen=True)
class TrainingLoop:
    """The loop of one run.

    Attributes:
        steps: of the whole run.
        eval_every: steps between two evaluations, each of which ends with a checkpoint; the last step has one too.
        seed: of the run, for its checkpoints.
        selector: the metric whose least value marks the best state.
        take_step: (state, batch) -> (state, sums), one optimizer step.
        evaluate: gives held-out metrics of parameters.
        checkpoints: keeps states.
        log: is told of each step.
    """

    steps: int
    eval_every: int
    seed: int
    selector: str
    take_step: Callable[[TrainState, Any], tuple[TrainState, Sums]]
    evaluate: Callable[[Params], dict[str, float]]
    checkpoints: Checkpoints
    log: TrainingLog

    def run(self, state: TrainState, batches: Iterator[Any]) -> TrainState:
        """Runs from the state's step to the last one, over the batches of the steps that are left.

        Raises:
            UserError: the loss or its gradient is no longer a number; no checkpoint of that state is kept.
            Preempted: the machine is about to be taken away; the last step is saved.
        """
        start, notice = int(state.step), PreemptionNotice()
        with self.log.shown(start), notice.listening():
            for step in range(start + 1, self.steps + 1):
                batch, began = next(batches), time.perf_counter()
                state, sums = self.take_step(state, batch)
                self.log.step(step, sums, began)
                if step % self.eval_every == 0 or step == self.steps:
                    self._evaluate(step, state)
                if notice(step) and step < self.steps:
                    self.log.save()
                    # A state that is not evaluated is never the best one. It is kept where an evaluated one is not.
                    self.checkpoints.save(state, self.seed, {self.selector: math.inf})
                    raise Preempted(
                        f"preempted after step {step} of {self.steps}, which is saved: the same command goes on"
                    )
        return state

    def _evaluate(self, step: int, state: TrainState) -> None:
        self.log.flush()  # before the checkpoint: a resumed run begins with the step after it
        metrics = self.evaluate(state.params)
        self.log.evaluation(step, metrics)
        self.checkpoints.save(state, self.seed, {self.selector: metrics[self.selector]})
