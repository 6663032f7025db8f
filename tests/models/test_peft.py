"""LoRA and Adapter within the blocks: fresh, rematerialised, cached, counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.cache import init_cache
from spa_jax.models.block import LlamaConfig
from spa_jax.models.compute import Compute
from spa_jax.models.llama import Llama
from spa_jax.models.peft import TARGETS, Peft, PeftConfig, init_peft, rank_for
from spa_jax.models.plugin import count_params
from tests.models.platforms import OtherPlatform

LORA, ADAPTER = PeftConfig("lora", 3, 6.0), PeftConfig("adapter", 5)
EVERYWHERE = dataclasses.replace(LORA, targets=TARGETS)
KINDS = pytest.mark.parametrize("config", [LORA, EVERYWHERE, ADAPTER], ids=["lora", "lora everywhere", "adapter"])
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 12)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128,
)  # fmt: skip


def random_peft(config, backbone):
    """Nothing in it is zero."""
    rng = np.random.default_rng(1)
    shapes = init_peft(config, backbone, abstract=True)
    return Peft(config, jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes))


@pytest.fixture(scope="module")
def run(tiny_config):
    model = Llama(tiny_config)
    return jax.jit(lambda params, tokens, positions, *more: model.apply({"params": params}, tokens, positions, *more))


@KINDS
def test_a_fresh_one_equals_the_base(config, run, tiny_config, tiny_params):
    base = run(tiny_params, TOKENS, POSITIONS).hidden
    fresh = Peft(config, init_peft(config, tiny_config, seed=1))
    np.testing.assert_array_equal(run(tiny_params, TOKENS, POSITIONS, None, None, fresh).hidden, base)
    other = run(tiny_params, TOKENS, POSITIONS, None, None, random_peft(config, tiny_config)).hidden
    assert np.abs(other - base).max() > 0.1


@KINDS
def test_cached_agrees_with_uncached(config, run, tiny_config, tiny_params):
    peft = random_peft(config, tiny_config)
    whole = run(tiny_params, TOKENS, POSITIONS, None, None, peft).hidden
    cache, hidden = init_cache(tiny_config, 2, 16, jnp.float32), []
    for start, end in ((0, 8), *((at, at + 1) for at in range(8, 12))):
        out = run(tiny_params, TOKENS[:, start:end], POSITIONS[:, start:end], cache, None, peft)
        cache = out.cache
        hidden.append(out.hidden)
    np.testing.assert_allclose(np.concatenate(hidden, axis=1), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "kept"),
    [(EVERYWHERE, ("full", "dots", "none")), (ADAPTER, ("full", "none"))],
    ids=["lora everywhere", "adapter"],
)
def test_what_is_kept_for_the_gradient_changes_memory_and_not_the_gradient(config, kept, tiny_config, tiny_params):
    peft = random_peft(config, tiny_config)
    tokens, positions = jnp.tile(TOKENS, (4, 4)), jnp.broadcast_to(jnp.arange(48, dtype=jnp.int32), (8, 48))

    def gradient(remat):
        model = Llama(tiny_config, remat=remat)

        def loss(params):
            out = model.apply({"params": tiny_params}, tokens, positions, None, None, Peft(config, params))
            return jnp.mean(jnp.sin(out.hidden))

        program = jax.jit(jax.grad(loss)).lower(peft.params).compile()
        return program(peft.params), program.memory_analysis().temp_size_in_bytes

    gradients, sizes = zip(*map(gradient, kept))
    for other in gradients[:-1]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, gradients[-1])
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradients[-1]))
    assert sorted(set(sizes)) == list(sizes)


def test_in_bfloat16_its_part_is_bfloat16_too(tiny_config, tiny_params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params)
    model = Llama(tiny_config, dtype=jnp.bfloat16, partitioner=OtherPlatform("gpu"), compute=Compute(attention="xla"))
    for config in (EVERYWHERE, ADAPTER):
        peft = random_peft(config, tiny_config)
        out = jax.eval_shape(lambda peft: model.apply({"params": half}, TOKENS, POSITIONS, peft=peft), peft)
        assert out.hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("config", "count", "share"),
    [
        (PeftConfig("lora", 24, 48.0), 32 * 2 * 24 * (4096 + 4096), 0.0019),
        (PeftConfig("adapter", 48), 32 * 2 * (2 * 4096 * 48 + 4096 + 48), 0.0038),
        (PeftConfig("lora", 2, 1.0, TARGETS), 32 * 2 * (4 * 2 * 4096 + 3 * (4096 + 11008)), 0.0007),
    ],
)
def test_llama_7b_gets_as_many_parameters_as_in_the_paper(config, count, share):
    found = count_params(init_peft(config, LLAMA_7B, abstract=True))
    assert found == count
    assert round(found / LLAMA_7B.num_params, 4) == share


@pytest.mark.parametrize("wanted", [1, 20_000, 12_900_000, 50_000_000])
@KINDS
def test_no_other_rank_is_nearer_to_the_wanted_count(config, wanted):
    found = rank_for(config, LLAMA_7B, wanted)

    def miss(rank):
        counted = dataclasses.replace(config, rank=rank)
        return abs(count_params(init_peft(counted, LLAMA_7B, abstract=True)) - wanted)

    assert miss(found.rank) <= min(miss(max(1, found.rank - 1)), miss(found.rank + 1))
    assert found.alpha / found.rank == pytest.approx(config.alpha / config.rank)
    assert wanted > 20_000 or found.rank == 1
