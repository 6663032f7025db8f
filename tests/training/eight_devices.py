"""Runs a tiny model on several meshes of eight devices and on one device; a process of its own, since the number of
devices is fixed when JAX starts. Writes JSON for `test_eight_devices.py` to standard output."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import dataclasses
import json
import sys

import jax
import numpy as np
import optax

from spa_jax.compiling.hlo import parse
from spa_jax.data.pipeline import Batch
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import GREEDY
from spa_jax.models.block import LlamaConfig
from spa_jax.models.compute import Compute
from spa_jax.models.llama import Llama, init_params
from spa_jax.models.peft import PeftConfig, init_peft
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.quantized import quantize
from spa_jax.models.side import SideConfig
from spa_jax.training.features import extract, kept_for
from spa_jax.training.objective import RouterConfig
from spa_jax.training.peft_recipe import PeftRecipe
from spa_jax.training.plugin_recipe import PluginRecipe
from spa_jax.training.sharding import MeshConfig, MeshPartitioner, make_mesh
from spa_jax.training.step import eval_step, init_state, train_step
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin

TAPS = (0, 2, 3)
CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=5, num_heads=8, num_kv_heads=2, head_dim=8
)
ROWS, LENGTH, TARGETS, ACCUMULATE = 16, 12, 6, 2
TOKENWISE = PluginConfig("spa", SideConfig("tokenwise", 8, TAPS), CONFIG.hidden_size, offset=True)
TRANSFORMER = PluginConfig("s2", SideConfig("transformer", 8, TAPS, heads=2), CONFIG.hidden_size)
BELOW = (0, 3)
TARGETS_BELOW = PluginConfig("spa", SideConfig("tokenwise", 8, BELOW), CONFIG.hidden_size, offset=True, entry=3)
ALL_BELOW = PluginConfig("s1", SideConfig("transformer", 8, BELOW, heads=2), CONFIG.hidden_size, entry=3, edits="all")
LORA = PeftConfig("lora", 4)
ROUTER = RouterConfig("improvement", 0.0, True, True, True)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-2), eps=1e-4, weight_decay=0.1))
"""Training's at a constant rate, decaying vectors too, and with another eps: Adam divides by the size of a gradient,
and with its usual eps, where that is float noise, whole steps would be."""


extract_features = jax.jit(extract, static_argnums=(0, 3))


def partitioner_of(shape):
    return MeshPartitioner(make_mesh(MeshConfig(*shape, 1), ROWS, jax.devices()[: int(np.prod(shape))]))


def random(tree, seed, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(np.float32), tree)


def in_8_bits(params):
    def quantized(keys, leaf):
        return quantize("/".join(key.key for key in keys), leaf)

    return jax.jit(lambda tree: jax.tree_util.tree_map_with_path(quantized, tree))(params)


def make_batch():
    rng = np.random.default_rng(3)
    integers = {"dtype": np.int32}
    return Batch(
        tokens=rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH), **integers),
        lengths=rng.integers(LENGTH - 2, LENGTH + 1, ROWS, **integers),
        predict=np.broadcast_to(np.arange(TARGETS, **integers) + 4, (ROWS, TARGETS)).copy(),
        targets=rng.integers(0, CONFIG.vocab_size, (ROWS, TARGETS), **integers),
        weights=(np.arange(TARGETS) < rng.integers(1, TARGETS + 1, (ROWS, 1))).astype(np.float32),
    )


def run_inner(partitioner, frozen, batch):
    """Trains and measures plugins in front of an inner block, from cached features and from tokens."""
    model = Llama(CONFIG, BELOW, partitioner=partitioner, compute=Compute("xla"), entry=3)
    features = extract_features(model, frozen, batch, kept_for(TARGETS_BELOW))
    cached = partitioner.shard_batch(partitioner.to_local(features))
    targets = PluginRecipe(TARGETS_BELOW, True, dataclasses.replace(ROUTER, cross_fit=False, labels="always"))
    everywhere = PluginRecipe(ALL_BELOW, False, ROUTER)
    params = partitioner.place(random(init_plugin(TARGETS_BELOW, abstract=True), 10))
    computed = {"features": features, "inner_outcomes": eval_step(targets, model, params, frozen, cached, 0.5)}
    states, steps = [], []
    steps_of = (("targets", targets, model, cached), ("all", everywhere, model.clone(remat="dots"), batch))
    for name, recipe, program, rows in steps_of:
        state = partitioner.place(init_state(random(init_plugin(recipe.method, abstract=True), 11), TX))
        steps.append(train_step.lower(recipe, program, TX, ACCUMULATE, state, frozen, rows).compile())
        state, computed[f"{name}_sums"] = steps[-1](state, frozen, rows)
        computed[name] = state.params
        states.append(state)
    return computed, states, steps


def run(partitioner):
    """Runs everything on a mesh; returns the results as arrays on the host, and some arrays where they lie."""
    frozen = partitioner.place(init_params(CONFIG, seed=1))
    batch = partitioner.shard_batch(make_batch())
    xla = Compute("xla")  # one device alone would take another kernel
    model = Llama(CONFIG, TAPS, partitioner=partitioner, compute=xla)
    params = random(init_plugin(TOKENWISE, abstract=True), 5)
    folds = [random(init_plugin(TOKENWISE, abstract=True)["side"], seed) for seed in (6, 7)]
    params["folds"] = jax.tree.map(lambda *leaves: np.stack(leaves), *folds)
    state = partitioner.place(init_state(params, TX))
    recipe = PluginRecipe(TOKENWISE, cached=False, router=ROUTER)
    compiled = train_step.lower(recipe, model, TX, ACCUMULATE, state, frozen, batch).compile()
    for _ in range(2):
        state, sums = compiled(state, frozen, batch)
    other = partitioner.place(random(init_plugin(TRANSFORMER, abstract=True), 8))
    attends = PluginRecipe(TRANSFORMER, cached=False)
    outcomes = eval_step(attends, model, other, frozen, batch, 0.5)
    frozen_8 = partitioner.place(in_8_bits(init_params(CONFIG, seed=1)))
    quantized = Llama(CONFIG, TAPS, partitioner=partitioner, compute=Compute("xla", weights="int8"))
    outcomes_8 = eval_step(attends, quantized, other, frozen_8, batch, 0.5)
    remat = dataclasses.replace(model, taps=(), remat="full")
    lora = partitioner.place(init_state(random(init_peft(LORA, CONFIG, abstract=True), 9), TX))
    lora, lora_sums = train_step(PeftRecipe(LORA), remat, TX, ACCUMULATE, lora, frozen, batch)
    plugin = Plugin(TOKENWISE, {k: v for k, v in params.items() if k != "folds"}, "", "", "plain")
    plugin = dataclasses.replace(plugin, params=partitioner.place(plugin.params))
    fused = FusedModel(Backbone("", CONFIG, frozen, None, (5,), "", partitioner, xla), plugin)
    prompts = [np.random.default_rng(row).integers(0, 96, 3 + row % 5).tolist() for row in range(8)]
    decoded = fused.advance(fused.start(prompts, 6), GREEDY, 6)
    inner, inner_states, inner_steps = run_inner(partitioner, frozen, batch)
    computed = {
        **inner,
        "params": state.params, "optimizer": state.opt_state, "sums": sums,
        "outcomes": outcomes, "outcomes_8": outcomes_8,
        "lora": lora.params, "lora_sums": lora_sums,
        "tokens": decoded.hypotheses.tokens, "consulted": decoded.hypotheses.consulted, "cache": decoded.cache,
    }  # fmt: skip
    return jax.device_get(computed), frozen, (state, lora, *inner_states), decoded, [compiled, *inner_steps]


def difference(expected, found):
    """Returns the largest difference of two trees, relative to the largest number of each leaf."""
    apart = [
        np.max(np.abs(np.asarray(a, np.float64) - b)) / max(1.0, np.max(np.abs(a)))
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
        if np.size(a)
    ]
    return float(max(apart))


def gathered(text):
    """Returns the shapes of all arrays that the program gathers."""
    _, computations = parse(text)
    instructions = [instruction for body in computations.values() for instruction in body.values()]
    return [array.shape for i in instructions if i.opcode.startswith("all-gather") for array in i.arrays]


def main(names):
    expected, *_ = run(partitioner_of((1, 1, 1)))
    report = {}
    for name in names:
        partitioner = partitioner_of(tuple(map(int, name.split("x"))))
        found, frozen, states, decoded, steps = run(partitioner)
        wanted = partitioner.param_shardings((frozen, states))
        misplaced = [
            jax.tree_util.keystr(keys)
            for (keys, leaf), sharding in zip(
                jax.tree_util.tree_leaves_with_path((frozen, states)), jax.tree.leaves(wanted), strict=True
            )
            if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        ]
        keys = decoded.cache["k"]
        report[name] = {
            "differences": {part: difference(expected[part], found[part]) for part in expected},
            "misplaced": misplaced,
            "cache": keys.shape,
            "cache_part": keys.sharding.shard_shape(keys.shape),
            "gathered": [shape for step in steps for shape in gathered(step.as_text())],
            "state": sum(leaf.nbytes for leaf in jax.tree.leaves(states[0])),
            "outputs": sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(steps[0].out_info)),
        }
    print(json.dumps(report, default=int))


if __name__ == "__main__":
    main(sys.argv[1:])
