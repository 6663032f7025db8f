"""Tools that timings share: two threads, decode steps of prompts that have run, and a plugin that is like any other."""

import dataclasses
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import GREEDY
from spa_jax.models.combine import Edits
from spa_jax.models.llama import Entry
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin

THREADS = 2
BACKBONE = "smollm2-135m-instruct"


def use_threads() -> None:
    """Keeps this process to as many processors as threads are meant to be used."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def milliseconds(run: Callable[[], object]) -> float:
    """Times one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - began)


def decode_steps(
    backbone: Backbone,
    shape: tuple[int, int],
    steps: int,
    room: int,
    rng: np.random.Generator,
    beams: int | None = None,
) -> Callable[[], object]:
    """Runs random prompts, and returns a function that generates `steps` more tokens of each whenever it is called.

    Args:
        backbone: generates alone, and goes on after an end of sequence.
        shape: number of prompts, and tokens of each.
        steps: tokens of a call.
        room: tokens that all calls may generate of a prompt.
        rng: draws the prompts.
        beams: width of the beam search; None for greedy decoding.
    """
    model, search = FusedModel(dataclasses.replace(backbone, eos_ids=()), None), None if beams is None else Beams(beams)
    state, until = model.start(rng.integers(100, 40_000, shape).tolist(), room, beams=search), 1

    def advance() -> object:
        nonlocal state, until
        until += steps
        state = model.advance(state, GREEDY, until, search)
        return state.position

    return advance


def make_plugin(backbone: Backbone, entry: Entry, edits: Edits = "targets") -> Plugin:
    """Makes a random plugin with six taps that changes little."""
    last = backbone.config.num_layers if entry == "head" else entry
    side = SideConfig("tokenwise", 64, tuple(range(last % 3, last + 1, 3))[-6:])
    config = PluginConfig("spa", side, backbone.config.hidden_size, entry=entry, edits=edits)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.float32(0.01 * rng.standard_normal(leaf.shape))), init_plugin(config, abstract=True)
    )
    return Plugin(config, params, backbone.name, backbone.fingerprint, "plain")
