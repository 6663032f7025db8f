"""Tokens per second and time to the first token through a device's endpoint, against the bare channel.

    python -m experiments.benchmarks.endpoint

SmolLM2 in float32 with a random plugin that is always asked. Cloud and endpoint are processes of their own. Clients of
the endpoint are tasks of this process, which read streams of server-sent events; on the bare channel the devices are.
Both ask the same questions, each number of them at once, in turn; the medians of `REPEATS` runs count.
"""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx2
from absl import flags

from experiments.benchmarks.output import write_result
from experiments.benchmarks.timing import BACKBONE, make_plugin
from experiments.record import print_table
from spa_jax import command
from spa_jax.conversation import Conversation
from spa_jax.models.llama import Entry
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.messages_pb2 import Progress
from spa_jax.split.request import open_message
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

AT_ONCE = flags.DEFINE_list("at_once", ["1", "8"], "Numbers of questions at once.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each that count.", lower_bound=1)
NEW = 64
ENTRY: Entry = "head"
QUESTIONS = [f"Tell me about thing number {number}, and do not stop too soon." for number in range(32)]

Asked = Callable[[str], Awaitable[tuple[float, int]]]
"""A question -> seconds to the first token, and tokens."""


@contextlib.contextmanager
def endpoint_process(plugin: Plugin, cloud: str) -> Iterator[str]:
    """Runs a device with an endpoint, and gives its address."""
    with tempfile.TemporaryDirectory() as directory:
        plugin.save(Path(directory) / "mine" / "plugin")
        command_line = [
            sys.executable, "-m", "spa_jax.serve", "device", f"--plugin={directory}/mine/plugin", f"--cloud={cloud}",
            "--http=127.0.0.1:0",
        ]  # fmt: skip
        with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield process.stdout.readline().split(" at ")[1].split("/v1")[0]
            finally:
                process.terminate()


def over_channel(plugin: Plugin, cloud: str) -> Asked:
    """Asks over the bare channel."""

    async def ask(question: str) -> tuple[float, int]:
        began, first = time.perf_counter(), 0.0

        def see(progress: Progress) -> None:
            nonlocal first
            first = first or time.perf_counter() - began

        request = open_message(plugin, [Conversation().asked(question)], NEW, threshold=0.0)
        result = await generate(Connection(cloud), plugin, request, see)
        return first, len(result.generations[0].tokens)

    return ask


def over_http(client: httpx2.AsyncClient) -> Asked:
    """Asks through the endpoint."""

    async def ask(question: str) -> tuple[float, int]:
        began, first, tokens = time.perf_counter(), 0.0, 0
        messages = [{"role": "user", "content": question}]
        body = {"model": "mine", "messages": messages, "max_tokens": NEW, "stream": True, "spa": {"threshold": 0.0}}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[len("data: ") :])["choices"]:
                    new = len(choice.get("spa", {}).get("tokens", []))
                    first = first or (time.perf_counter() - began if new else 0.0)
                    tokens += new
        return first, tokens

    return ask


async def measure(ways: dict[str, Asked], count: int) -> dict[str, dict[str, float]]:
    """Asks so many questions at once in every way, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS.value + 1):
        for name, ask in ways.items():
            began = time.perf_counter()
            found = await asyncio.gather(*map(ask, QUESTIONS[:count]))
            seconds = time.perf_counter() - began
            if repeat:
                rates[name].append(sum(tokens for _, tokens in found) / seconds)
                firsts[name] += [first for first, _ in found]
    return {
        name: {
            "tokens_per_second": statistics.median(rates[name]),
            "seconds_to_first_token": statistics.median(firsts[name]),
        }
        for name in ways
    }


async def measure_all(plugin: Plugin, cloud: str, url: str) -> dict[str, dict[str, dict[str, float]]]:
    """Measures every number of questions."""
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=httpx2.Limits(max_connections=64)) as client:
        ways = {"channel": over_channel(plugin, cloud), "endpoint": over_http(client)}
        return {count: await measure(ways, int(count)) for count in AT_ONCE.value}


def main() -> None:
    backbone = load_backbone(BACKBONE)
    plugin = make_plugin(backbone, ENTRY)
    with (
        cloud_process(backbone.name, "--deadline=30", "--first_deadline=60", "--warm=160") as cloud,
        endpoint_process(plugin, cloud.address) as url,
    ):
        found = asyncio.run(measure_all(plugin, cloud.address, url))
    rows = []
    for count, ways in found.items():
        ratio = ways["endpoint"]["tokens_per_second"] / ways["channel"]["tokens_per_second"]
        ways["ratio"] = {"tokens_per_second": ratio}
        for name in ("channel", "endpoint"):
            values = ways[name].values()
            rows.append((count, name, *(f"{value:.3f}" for value in values), f"{ratio:.3f}"))
    print_table(("at once", "way", "tokens/s", "s to first token", "endpoint / channel"), rows)
    write_result("endpoint", {"new": NEW, "measured": found})


if __name__ == "__main__":
    command.run(main)
