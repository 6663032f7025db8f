"""Ranges of the backbone's blocks, against all of them at once and against blocks applied one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.cache import init_cache
from spa_jax.models.block import Block, LlamaConfig, place_by_position, rope_angles
from spa_jax.models.compute import Compute
from spa_jax.models.llama import Llama, LlamaOutput, init_params
from spa_jax.models.peft import Peft, PeftConfig, init_peft
from spa_jax.models.quantized import quantize

TAPS = (0, 1, 3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 6)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), TOKENS.shape)
LORA, INT8 = PeftConfig("lora", 3, 6.0, ("q", "v", "down")), Compute(weights="int8")


@jax.jit
def in_8_bits(params):
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: quantize("/".join(k.key for k in keys), leaf), params)


@pytest.fixture(scope="module")
def lora(tiny_config):
    rng, shapes = np.random.default_rng(1), init_peft(LORA, tiny_config, abstract=True)
    return Peft(LORA, jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes))


@pytest.mark.parametrize("adapted", [False, True], ids=["float, uncached", "int8 with a LoRA, cached"])
def test_two_ranges_in_a_row_are_all_blocks(adapted, tiny_config, tiny_params, lora):
    params, compute, peft, cache = tiny_params, Compute(), None, None
    if adapted:
        params, compute, peft = in_8_bits(tiny_params), INT8, lora
        cache = init_cache(tiny_config, 2, 8, jnp.float32)
    model = Llama(tiny_config, TAPS, compute=compute)

    def in_two(params, entry, cache):
        llama = model.bind({"params": params})
        h = llama.embed_tokens(TOKENS)
        h, lower, cache = llama.run_blocks(h, POSITIONS, cache, None, peft, last=entry, taps=TAPS)
        h, upper, cache = llama.run_blocks(h, POSITIONS, cache, None, peft, first=entry, taps=TAPS)
        return LlamaOutput(llama.final_norm(h), jnp.stack([lower, upper]), cache)

    whole = jax.jit(model.apply)({"params": params}, TOKENS, POSITIONS, cache, None, peft)
    for static, entries in ((True, (1,)), (False, range(4))):
        program = jax.jit(in_two, static_argnums=1) if static else jax.jit(in_two)
        for entry in entries:
            found = program(params, entry, cache)
            within = np.array([[tap <= entry for tap in TAPS], [tap >= entry for tap in TAPS]])[..., None, None, None]
            expected = whole._replace(taps=np.asarray(whole.taps)[None] * within)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_gradients_through_a_range_are_those_of_blocks_one_by_one(tiny_config, tiny_params, lora):
    entry, model = 1, Llama(tiny_config, remat="full")
    places, angles = place_by_position(POSITIONS, None), rope_angles(tiny_config, POSITIONS)
    shape = (*TOKENS.shape, tiny_config.hidden_size)
    correction = 0.5 * np.random.default_rng(2).standard_normal(shape).astype(np.float32)

    def loss(params, correction, lora):
        llama = model.bind({"params": params})
        h, *_ = llama.run_blocks(llama.embed_tokens(TOKENS), POSITIONS, last=entry)
        h, *_ = llama.run_blocks(h + correction, POSITIONS, peft=Peft(LORA, lora), first=entry)
        return jnp.mean(jnp.sin(h))

    def judge(params, correction, lora):
        h = params["embed"]["embedding"][TOKENS]
        for layer in range(tiny_config.num_layers):
            h = h + correction if layer == entry else h
            block, adapters = jax.tree.map(lambda leaf, layer=layer: leaf[layer], (params["blocks"], lora))
            adapted = (Peft(LORA, adapters),) if layer >= entry else ()
            h, _ = Block(tiny_config, jnp.float32).apply({"params": block}, h, None, layer, angles, places, *adapted)
        return jnp.mean(jnp.sin(h))

    found, wanted = (
        jax.jit(jax.grad(each, argnums=(0, 1, 2)))(tiny_params, correction, lora.params) for each in (loss, judge)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, wanted)
    for leaf in jax.tree.leaves(found[2]):
        assert not np.any(leaf[:entry])
        assert np.all(np.abs(leaf[entry:]).max(axis=(1, 2)) > 1e-5)


@pytest.mark.parametrize(
    ("int8", "first", "bounds", "gradient"),
    [
        (True, 0, "static", None),
        (True, 6, "traced", None),
        (False, 6, "static", None),
        (False, 6, "static", "full"),
        (False, 6, "static", "none"),
    ],
)
def test_no_second_copy_of_the_blocks_is_made(int8, first, bounds, gradient):
    """The compiled program holds less than an eighth of the range's blocks, as floats, beside its arguments."""
    config = LlamaConfig(
        vocab_size=7, hidden_size=64, intermediate_size=256, num_layers=24, num_heads=4, num_kv_heads=2, head_dim=16
    )
    floats = init_params(config, abstract=True)
    params = jax.eval_shape(in_8_bits, floats) if int8 else floats
    model = Llama(config, remat=gradient or "none", compute=INT8 if int8 else Compute())
    positions = jnp.zeros((1, 1), jnp.int32)

    def run(h, params, first, last):
        h, *_ = model.apply({"params": params}, h, positions, first=first, last=last, method="run_blocks")
        return jnp.sum(jnp.sin(h))

    program = jax.jit(jax.grad(run) if gradient else run, static_argnums=(2, 3) if bounds == "static" else ())
    compiled = program.lower(jax.ShapeDtypeStruct((1, 1, 64), jnp.float32), params, first, 24).compile()
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(floats["blocks"])) * (24 - first) / 24
    assert compiled.memory_analysis().temp_size_in_bytes < size / 8
