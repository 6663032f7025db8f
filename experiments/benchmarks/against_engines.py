r"""Tokens per second of many prompts at once: our cloud, `transformers`, and llama.cpp's server, in one run.

    python -m experiments.benchmarks.against_engines --llama_server=PATH/llama-server

SmolLM2's weights, `PROMPTS` random prompts, which are others in every run, and greedy answers that do not end early,
on two threads each. They take turns: one run of each warms up, `REPEATS` count. Their numbers and kernels differ:

- our cloud computes in float32 by XLA, for as many devices, which are tasks of this process; one line is the backbone
  alone, the other a random plugin at the default entry that corrects the prompt and is always asked
- `transformers` computes in float32 by PyTorch, and has all prompts in one batch
- llama.cpp computes by its own kernels, from a file with the matrices in 16 or 8 bits, for as many HTTP clients; its
  cache of prompts is off

Answers are compared with those of our cloud alone, which shows that the weights are the same ones. No answer ends
early: the checkpoint names no end of sequence, and llama.cpp's server, whose file does, is told never to say it, so an
answer that would end there goes on otherwise.

The source of llama-cpp-python on PyPI has that of the server:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-server
"""

import asyncio
import contextlib
import dataclasses
import functools
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks.llama_cpp import llama_server, write_gguf
from experiments.benchmarks.output import write_result
from experiments.benchmarks.pytorch import export
from experiments.benchmarks.timing import BACKBONE, THREADS, make_plugin, use_threads
from experiments.record import print_table
from spa_jax import command
from spa_jax.models.combine import Setting
from spa_jax.models.plugin import parse_entry
from spa_jax.split.client import generate
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.connection import Connection
from spa_jax.split.request import open_message
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

LLAMA_SERVER = flags.DEFINE_string("llama_server", "llama-server", "llama.cpp's server; without it, it is left out.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each that count.", lower_bound=1)
PROMPTS, LENGTH, NEW = 16, 64, 32
KINDS = ("F16", "Q8_0")

Prompts = list[list[int]]
Generate = Callable[[Prompts], list[list[int]]]
"""Prompts -> the new tokens of each."""


def ask_cloud(address: str, plugin: Plugin, setting: Setting, prompts: Prompts) -> list[list[int]]:
    """Generates by as many devices at once; a device is asked about every token."""

    async def one(prompt: list[int]) -> list[int]:
        request = open_message(plugin, [prompt], NEW, setting=setting, threshold=0.0)
        result = await generate(Connection(address), plugin, request)
        return list(result.generations[0].tokens)

    async def together() -> list[list[int]]:
        return await asyncio.gather(*map(one, prompts))

    return asyncio.run(together())


@functools.cache
def _pytorch_model(directory: str) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def ask_pytorch(directory: str, prompts: Prompts) -> list[list[int]]:
    """Generates by `transformers`, all prompts in one batch."""
    import torch

    ids = torch.tensor(prompts)
    with torch.inference_mode():
        answers = _pytorch_model(directory).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
    return answers[:, ids.shape[1] :].tolist()


@contextlib.contextmanager
def engines(named: Backbone) -> Iterator[dict[str, Generate]]:
    """Starts all of them, the first of which is our cloud alone, on the same weights without an end of sequence."""
    ways: dict[str, Generate] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        export(dataclasses.replace(named, eos_ids=()), folder / "model")
        named.tokenizer.backend_tokenizer.save(str(folder / "model" / "tokenizer.json"))
        backbone = load_backbone(str(folder / "model"))
        plugin = make_plugin(backbone, parse_entry("middle", backbone.config), "all")
        deadlines = "--deadline=30", "--first_deadline=60"
        cloud = stack.enter_context(cloud_process(backbone.name, *deadlines, f"--warm={2 * LENGTH}"))
        settings: tuple[Setting, ...] = ("base", "spa")
        for setting in settings:
            ways[f"spa_jax {setting}, float32"] = functools.partial(ask_cloud, cloud.address, plugin, setting)
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        ways["transformers, float32"] = lambda prompts: pool.submit(
            ask_pytorch, str(folder / "model"), prompts
        ).result()
        program = shutil.which(LLAMA_SERVER.value)
        if program is None:
            print(f"llama.cpp is left out: there is no {LLAMA_SERVER.value}; name its server with --llama_server")
        else:
            for kind in KINDS:
                write_gguf(named, folder / f"{kind}.gguf", kind)
                server = stack.enter_context(llama_server(program, folder / f"{kind}.gguf", PROMPTS, LENGTH + NEW))
                ways[f"llama.cpp, {kind}"] = functools.partial(server.generate, new=NEW)
        yield ways


def measure(ways: dict[str, Generate], vocabulary: int) -> dict[str, dict[str, float]]:
    """Measures them in turn."""
    rng, (ours, *_) = np.random.default_rng(1), ways
    rates: dict[str, list[float]] = {name: [] for name in ways}
    same: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS.value + 1):
        prompts = rng.integers(vocabulary // 100, vocabulary, (PROMPTS, LENGTH)).tolist()
        answers = {}
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way(prompts)
            seconds = time.perf_counter() - began
            if repeat:
                rates[name].append(sum(map(len, answers[name])) / seconds)
                same[name] += [float(a[:NEW] == b) for a, b in zip(answers[name], answers[ours])]
    return {
        name: {
            "tokens_per_second": statistics.median(rates[name]),
            "slowest": min(rates[name]),
            "fastest": max(rates[name]),
            "times_ours": statistics.median(rates[name]) / statistics.median(rates[ours]),
            "same_answers": statistics.mean(same[name]),
        }
        for name in ways
    }


def main() -> None:
    use_threads()
    backbone = load_backbone(BACKBONE)
    with engines(backbone) as ways:
        found = measure(ways, backbone.config.vocab_size)
    rows = [(name, *(f"{value:.2f}" for value in row.values())) for name, row in found.items()]
    print_table(("engine", "tokens/s", "slowest", "fastest", "times spa_jax base", "same answers"), rows)
    sizes = {"prompts": PROMPTS, "length": LENGTH, "new": NEW}
    write_result("against_engines", {**sizes, "measured": found}, threads=THREADS)


if __name__ == "__main__":
    command.run(main)
