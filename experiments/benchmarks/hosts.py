"""Two hosts on one machine: network namespaces, joined by a link with delay, bandwidth and loss. Linux, as root.

The link is a process between two TUN devices that holds every packet for its time; so it needs no kernel module, as
`tc netem` would, and what crosses is real TCP.
"""

import contextlib
import dataclasses
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

from spa_jax.errors import UserError

CLOUD, DEVICE = "10.213.7.1", "10.213.7.2"
"""Addresses of the two hosts."""
TUNSETIFF, IFF_TUN, IFF_NO_PI, LONGEST_PACKET = 0x400454CA, 0x0001, 0x1000, 65536
QUEUE = 1000
"""Packets that wait on each side of the link; more are dropped, as a router does."""


@dataclasses.dataclass(frozen=True)
class Link:
    """The link between the hosts.

    Attributes:
        round_trip: seconds, half of it each way.
        rate: bits per second each way.
        loss: probability that a packet is dropped.
        congestion: TCP's congestion control. `bbr` spreads what it sends over a good part of the round trip; `reno`,
            which every kernel has, sends at once what its window allows, as the usual `cubic` does.
    """

    round_trip: float
    rate: float = 1e9
    loss: float = 0.0
    congestion: str = "reno"


def namespace(address: str) -> str:
    """Returns the name of the namespace of a host."""
    return f"spa{address.rsplit('.', 1)[-1]}x{os.getpid()}"


@contextlib.contextmanager
def two_hosts(link: Link) -> Iterator[None]:
    """Keeps two hosts up while the context lasts; `inside` runs commands on them.

    Raises:
        UserError: namespaces or TUN devices are not permitted here.
    """
    names = [namespace(address) for address in (CLOUD, DEVICE)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                _ip("netns", "exec", name, "sysctl", "-w", f"net.ipv4.tcp_congestion_control={link.congestion}")
            numbers = map(str, (link.round_trip, link.rate, link.loss))
            command = [sys.executable, "-m", "experiments.benchmarks.hosts", *names, *numbers]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None
            if process.stdout.readline() != "up\n":
                raise UserError("TUN devices are not permitted here: the link's own message is above")
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"network namespaces and TUN devices are not permitted here: {error}") from error
        yield


def inside(address: str, *command: str) -> list[str]:
    """Returns the command line that runs a command on a host."""
    return ["ip", "netns", "exec", namespace(address), *command]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _tun(name: str, space: str, address: str) -> int:
    """Opens a TUN device of that host, up and with its address."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    _ip("link", "set", name, "netns", space)
    for arguments in (
        ("addr", "add", f"{address}/24", "dev", name),
        ("link", "set", name, "mtu", "1500", "up"),
        ("link", "set", "lo", "up"),
    ):
        _ip("-n", space, *arguments)
    return device


def relay(names: list[str], link: Link) -> None:
    """Carries packets between the hosts until it is killed."""
    cloud, device = (
        _tun(f"spa{os.getpid()}{side}", name, address)
        for side, name, address in zip("cd", names, (CLOUD, DEVICE), strict=True)
    )
    print("up", flush=True)
    other = {cloud: device, device: cloud}
    waiting: dict[int, deque[tuple[float, bytes]]] = {cloud: deque(), device: deque()}
    free = {cloud: 0.0, device: 0.0}  # when the link has sent what was given to it
    chance = random.Random(0)
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=time.monotonic() + 1)
        ready, _, _ = select.select(list(other), [], [], max(due - time.monotonic(), 0))
        for source in ready:
            target, packet = other[source], os.read(source, LONGEST_PACKET)
            if len(waiting[target]) == QUEUE or chance.random() < link.loss:
                continue
            free[target] = max(free[target], time.monotonic()) + 8 * len(packet) / link.rate
            waiting[target].append((free[target] + link.round_trip / 2, packet))
        for target, queue in waiting.items():
            while queue and queue[0][0] <= time.monotonic():
                os.write(target, queue.popleft()[1])


if __name__ == "__main__":
    relay(sys.argv[1:3], Link(float(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])))
