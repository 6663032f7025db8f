"""A simulated network, on a virtual clock."""

import dataclasses

import numpy as np

from spa_jax.errors import UserError
from spa_jax.split.channel import Answer, InProcess


@dataclasses.dataclass(frozen=True)
class Network:
    """A link between cloud and device.

    Attributes:
        tau: seconds of a round trip, the paper's TCP/IP connection latency.
        down: bandwidth from cloud to device in bits per second.
        up: bandwidth from device to cloud in bits per second.
        jitter: mean seconds of an exponentially distributed delay of each message.
        loss: probability that a message does not arrive, below 1.
        deadline: seconds on the network after which a reply is lost; time in the device's program does not count, since
            it is real and depends on the machine.
        seed: of jitter and loss.
    """

    tau: float = 3.82e-3
    down: float = 1e9
    up: float = 1e9
    jitter: float = 0.0
    loss: float = 0.0
    deadline: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive = all(value > 0 for value in (self.down, self.up, self.deadline))
        if not (positive and self.tau >= 0 and self.jitter >= 0 and 0 <= self.loss < 1):
            raise UserError(
                f"a network of {self} makes no sense: times are not negative, bandwidths and the deadline positive, "
                "and loss is at least 0 and below 1"
            )


class Simulated(InProcess):
    """Calls the device as a function, and adds the time that the link would take to `traffic.network_seconds`."""

    def __init__(self, answer: Answer, network: Network) -> None:
        super().__init__(answer)
        self._network = network
        self._random = np.random.default_rng(network.seed)

    def send(self, message: bytes) -> None:
        """Sends a message that wants no reply, again and again until it arrives, as TCP does."""
        n = self._network
        while True:
            self.traffic.network_seconds += n.tau / 2 + 8 * len(message) / n.down + self._random.exponential(n.jitter)
            if not self._is_lost():
                break
            self.traffic.network_seconds += n.tau
        super().send(message)

    def exchange(self, message: bytes) -> bytes | None:
        n = self._network
        seconds = n.tau + 8 * len(message) / n.down + self._random.exponential(n.jitter)
        reply = None
        self.traffic.exchanges += 1
        self.traffic.bytes_down += len(message)
        if not self._is_lost():
            reply = self._call(message)
        if reply is not None:
            self.traffic.bytes_up += len(reply)
            seconds += 8 * len(reply) / n.up + self._random.exponential(n.jitter)
        if reply is None or self._is_lost() or seconds > n.deadline:
            self.traffic.lost += 1
            self.traffic.network_seconds += n.deadline
            return None
        self.traffic.network_seconds += seconds
        return reply

    def _is_lost(self) -> bool:
        return bool(self._random.random() < self._network.loss)
