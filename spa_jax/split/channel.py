"""The channel between cloud and device, and the traffic over it.

Messages are bytes of messages.proto. The cloud sends and asks; a function call, a simulated network or a real one
implements `Channel`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

Answer = Callable[[bytes], bytes | None]
"""The device's end of a channel: takes a message, and returns its reply, or None for a message that wants none."""


@dataclasses.dataclass
class Traffic:
    """The traffic of a generation.

    Attributes:
        exchanges: questions the device was asked, answered or not.
        lost: questions whose reply did not come in time.
        bytes_down: bytes of questions, cloud to device.
        bytes_up: bytes of replies, device to cloud.
        prefill_bytes: bytes of messages that bring a prompt's taps and want no reply, and of opening.
        network_seconds: time on the wire.
        device_seconds: time in the device's program.
    """

    exchanges: int = 0
    lost: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    prefill_bytes: int = 0
    network_seconds: float = 0.0
    device_seconds: float = 0.0


@runtime_checkable
class Channel(Protocol):
    """The cloud's connection to one device."""

    traffic: Traffic

    def send(self, message: bytes) -> None:
        """Sends a message that wants no reply."""

    def exchange(self, message: bytes) -> bytes | None:
        """Sends a question and waits for the reply; None when it did not come in time."""


class InProcess:
    """No network: the device is a function call away."""

    def __init__(self, answer: Answer) -> None:
        self.traffic = Traffic()
        self._answer = answer

    def send(self, message: bytes) -> None:
        self._call(message)
        self.traffic.prefill_bytes += len(message)

    def exchange(self, message: bytes) -> bytes | None:
        self.traffic.exchanges += 1
        self.traffic.bytes_down += len(message)
        reply = self._call(message)
        if reply is None:
            self.traffic.lost += 1
        else:
            self.traffic.bytes_up += len(reply)
        return reply

    def _call(self, message: bytes) -> bytes | None:
        began = time.perf_counter()
        reply = self._answer(message)
        self.traffic.device_seconds += time.perf_counter() - began
        return reply
