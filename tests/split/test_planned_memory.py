"""What a session takes of a cloud's memory is what was planned before it began."""

import ctypes
import dataclasses
import gc
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_split import EOS, FINGERPRINT, make_plugin

from spa_jax.models.llama import init_params
from spa_jax.split.messages_pb2 import FromCloud
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.weights.backbone import Backbone

PROMPTS, LENGTH, NEW = 16, 300, 8
NOISE = 64 * 2**20
"""Bytes that an allocator keeps of what was freed, and by which a process grows for reasons of its own."""


def memory(name):
    """Of this process, in bytes: `VmRSS` now, `VmHWM` at most since `forget_peak`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def forget_peak():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def wide(tiny_config):
    """A cloud whose taps are large: 32 KiB a token."""
    config = dataclasses.replace(
        tiny_config, hidden_size=1024, head_dim=128, num_heads=8, num_layers=7, max_position_embeddings=512
    )
    return Cloud(Backbone("wide", config, init_params(config), None, EOS, FINGERPRINT))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("edits", ["targets", "all"])
def test_prompts_with_many_taps_take_what_was_planned(edits, wide):
    """The device attends to, or corrects, all of long prompts, and reads every hidden state."""
    entry = "head" if edits == "targets" else 6
    taps = tuple(range(8 if entry == "head" else entry + 1))
    small = make_plugin("s1", "transformer", entry=entry, edits=edits)
    plugin = dataclasses.replace(
        small, config=dataclasses.replace(small.config, side=dataclasses.replace(small.config.side, taps=taps))
    )
    rng = np.random.default_rng(0)
    request = open_message(plugin, [rng.integers(0, 97, LENGTH).tolist() for _ in range(PROMPTS)], NEW)
    plan = wide.plan(request)

    def run():
        """Runs the opening, as a server does whose device is slow, and some tokens."""
        session = wide.begin(plan, None)
        sent = [FromCloud(taps=part) for part in session.prompt_messages()]
        while (question := session.next_question()) is not None:
            sent.append(FromCloud(taps=question))
            session.apply_reply(None)
            sent += [FromCloud(taps=part) for part in session.prompt_messages()]
        assert sum(len(message.taps.positions) for message in sent) >= PROMPTS * (LENGTH - 1)
        assert all(generation.tokens for generation in session.result())

    run()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(wide.engine.slots.cache))
    forget_peak()
    before = memory("VmRSS")
    run()
    taken = memory("VmHWM") - before
    planned = plan.bytes - min(cache, wide.engine.slots.unit_bytes * PROMPTS * -(-(LENGTH + NEW) // 64))
    print(f"{edits}: {taken / 2**20:.0f} MiB beside the cache, {planned / 2**20:.0f} planned")
    assert taken <= planned + NOISE
    assert taken >= 0.4 * planned
