"""Times that a benchmark notes on its devices: of opening, and of tokens."""

import dataclasses
import time

import numpy as np

from spa_jax.split.messages_pb2 import Progress


@dataclasses.dataclass
class Device:
    """A device of a benchmark: when it opened, and when its tokens came."""

    opened_at: float = dataclasses.field(default_factory=time.perf_counter)
    came_at: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0

    def see(self, progress: Progress) -> None:
        """Takes note of a message with tokens."""
        count = sum(len(generated.tokens) for generated in progress.generated)
        if count > self.tokens:
            self.came_at.append(time.perf_counter())
        self.tokens = count


def percentiles(values: list[float]) -> dict[str, float]:
    """Returns median and 95th percentile."""
    return {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95))}
