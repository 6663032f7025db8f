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
        opening_exchanges: questions about a prompt that is corrected.
        opening_seconds: time on the wire before the first question about a new token.
        prefill_bytes: bytes of all messages before that question: of the request, of the prompt's taps, and of the
            replies that correct a prompt.
        network_seconds: time on the wire from then on.
        device_seconds: time in the device's program.
    """

    exchanges: int = 0
    lost: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    prefill_bytes: int = 0
    opening_exchanges: int = 0
    opening_seconds: float = 0.0
    network_seconds: float = 0.0
    device_seconds: float = 0.0

    def end_opening(self) -> None:
        """Counts what was sent so far apart: the next question is the first about a new token."""
        self.opening_exchanges, self.exchanges = self.exchanges, 0
        self.prefill_bytes += self.bytes_down + self.bytes_up
        self.bytes_down = self.bytes_up = 0
        self.opening_seconds, self.network_seconds = self.network_seconds, 0.0
        self.lost = 0


def describe_opening(exchanges: int, seconds: float, uncorrected_prompts: int) -> str:
    """Describes what it took to correct a prompt, as the end of a line; empty where there was nothing to correct."""
    if not exchanges:
        return ""
    took = f" in {seconds:.2f} s" if seconds else ""
    failed = ", in vain: the prompt is uncorrected" if uncorrected_prompts else ""
    return f"; {exchanges} opening exchange{'s' if exchanges > 1 else ''}{took}{failed}"


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
