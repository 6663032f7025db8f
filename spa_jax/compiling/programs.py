"""The programs of a config, compiled from shapes alone: no weights, no data, no devices."""

import dataclasses
import functools
import re
import time
from collections.abc import Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from spa_jax.compiling.hlo import Cost, cost
from spa_jax.data.padding import padded_length
from spa_jax.data.pipeline import Batch
from spa_jax.decoding.cache import count_slots, init_cache, init_shared_cache
from spa_jax.decoding.sampling import GREEDY
from spa_jax.engine.batch import places_of, progress_of, wishes_of
from spa_jax.engine.extents import UNIT, count_units, power_of_two
from spa_jax.engine.group import Group, Task
from spa_jax.engine.layouts import lay_out
from spa_jax.engine.programs import MAX_STEPS, Parts, finish_prompts, run_prompts, run_steps
from spa_jax.engine.schedule import part_length
from spa_jax.models.combine import ADDED
from spa_jax.models.llama import Llama, Params, init_params
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.quantized import Matrix, quantize
from spa_jax.split import wire
from spa_jax.split.device import SideInput, correct
from spa_jax.split.wire import Codec, Encoded
from spa_jax.training.config import RunConfig
from spa_jax.training.features import extract, kept_for, tap_positions
from spa_jax.training.methods import plugin_config, recipe_from_config
from spa_jax.training.optimizer import make_optimizer
from spa_jax.training.sharding import MeshPartitioner
from spa_jax.training.step import TrainState, init_state, train_step
from spa_jax.weights.architectures import architecture
from spa_jax.weights.backbone import Backbone

ProgramName = Literal["train", "cloud", "device", "finetune"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one call of a program.

    Attributes:
        rows: rows of a batch (B) in training, prompts in generation.
        length: tokens of a row or prompt.
        targets: target tokens of a row (R), in training.
        room: most new tokens, in generation.
    """

    rows: int
    length: int
    targets: int
    room: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program and what it takes of each chip.

    Attributes:
        name: such as `train step` or `prefill`.
        seconds: how long it took to compile.
        argument_bytes: memory of the arguments; None if the program does not fit.
        temporary_bytes: memory beside arguments and results while it runs; None if the program does not fit.
        peak_bytes: most memory at one time; if the program does not fit, what the compiler asked for, or None.
        fits: whether the compiler found enough memory.
        cost: operations and bytes of one run; None if the program does not fit.
    """

    name: str
    seconds: float
    argument_bytes: int | None
    temporary_bytes: int | None
    peak_bytes: int | None
    fits: bool
    cost: Cost | None


def compile_programs(
    config: RunConfig, which: ProgramName, partitioner: MeshPartitioner, sizes: Sizes, codec: Codec
) -> Iterator[Compiled]:
    """Compiles the programs that a config runs.

    Args:
        config: the run's config.
        which: `train`; `cloud` or `device`, the halves of a generation; or `finetune`, which trains the whole backbone.
        partitioner: the mesh of devices to compile for.
        sizes: sizes of one call.
        codec: how numbers cross between cloud and device.

    Raises:
        UserError: the backbone's architecture is not known, or it cannot be split over the mesh.
    """
    dtype = jnp.dtype(config.dtype)
    shape = architecture(config.backbone)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), init_params(shape, abstract=True))
    if config.compute.weights == "int8" and which != "finetune":
        frozen = jax.eval_shape(lambda params: jax.tree_util.tree_map_with_path(_quantized, params), frozen)
    frozen = _placed(partitioner, frozen)
    tokenizer: Any = None
    backbone = Backbone(config.backbone, shape, frozen, tokenizer, (2,), "", partitioner, config.compute)
    if which == "train":
        yield from _train(config, backbone, partitioner, sizes)
        return
    if which == "finetune":
        yield _finetune(config, backbone, partitioner, sizes)
        return
    plugin = plugin_config(config, shape)
    if which == "cloud":
        yield from _cloud(plugin, backbone, partitioner, sizes)
    else:
        yield _device(plugin, partitioner, sizes, codec)


def _train(config: RunConfig, backbone: Backbone, partitioner: MeshPartitioner, sizes: Sizes) -> Iterator[Compiled]:
    recipe = recipe_from_config(config, backbone.config)
    model = recipe.model(backbone)
    partitioner.check_batch(sizes.rows, config.train.accumulate)
    batch: Any = _batch(partitioner, sizes)
    optimizer = make_optimizer(config.optimizer, 100)

    def fresh(params: Params) -> Any:
        return init_state(recipe.init_params(dataclasses.replace(backbone, params=params)), optimizer)

    state = _placed(partitioner, jax.eval_shape(fresh, backbone.params))
    if config.tap_cache.enabled and recipe.method.side is not None:
        backbone_pass = jax.jit(extract, static_argnums=(0, 3))
        arguments = (model, backbone.params, batch, kept_for(cast(PluginConfig, recipe.method)))
        yield _compile("backbone pass", backbone_pass, *arguments)
        features = jax.eval_shape(lambda params, batch: extract(model, params, batch, arguments[3]), *arguments[1:3])
        batch = jax.tree.map(lambda leaf: _array(partitioner, leaf.shape, leaf.dtype), features)
    accumulate = config.train.accumulate
    yield _compile("train step", train_step, recipe, model, optimizer, accumulate, state, backbone.params, batch)


def _quantized(path: tuple[Any, ...], leaf: jax.Array) -> Matrix:
    return quantize("/".join(key.key for key in path), leaf)


def _batch(partitioner: MeshPartitioner, sizes: Sizes) -> Batch:
    length, targets = padded_length(sizes.length, 32), padded_length(sizes.targets, 8)
    integer, shapes = jnp.int32, [(sizes.rows, length), (sizes.rows,), *[(sizes.rows, targets)] * 3]
    dtypes: list[Any] = [integer, integer, integer, integer, jnp.float32]
    leaves: list[Any] = [_array(partitioner, shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    return Batch(*leaves)


def _finetune(config: RunConfig, backbone: Backbone, partitioner: MeshPartitioner, sizes: Sizes) -> Compiled:
    """Compiles a step that trains every parameter of the backbone, in float32, with blocks rematerialised."""
    partitioner.check_batch(sizes.rows)
    model = Llama(backbone.config, (), jnp.dtype(config.dtype), "full", partitioner)
    optimizer = make_optimizer(config.optimizer, 100)

    def summed(params: Params, batch: Batch) -> jax.Array:
        positions, _ = tap_positions(batch, everywhere=True)
        out = model.apply({"params": params}, batch.tokens, positions)
        hidden = jnp.take_along_axis(out.hidden, jnp.asarray(batch.predict)[:, :, None], axis=1)
        logits = partitioner.constrain(model.apply({"params": params}, hidden, method="logits"), "B.V")
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets) * batch.weights)

    def step(state: TrainState, batch: Batch) -> TrainState:
        grads = partitioner.constrain_params(jax.grad(summed)(state.params, batch))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return partitioner.constrain_params(
            TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        )

    state = jax.eval_shape(lambda: init_state(init_params(backbone.config), optimizer))
    return _compile("step", jax.jit(step, donate_argnums=0), _placed(partitioner, state), _batch(partitioner, sizes))


def _cloud(plugin: PluginConfig, backbone: Backbone, partitioner: MeshPartitioner, sizes: Sizes) -> Iterator[Compiled]:
    """Compiles the engine's programs: a part of one prompt, and a step of all. The entry is fixed here, so that it is
    known how often loops run."""
    size = backbone.config
    model = backbone.model(tuple(range(size.num_layers + 1)))
    dtype = model.activation_dtype
    depth = size.num_layers if plugin.entry == "head" else plugin.entry
    router = np.zeros((size.hidden_size, 2), np.float32), np.zeros(size.hidden_size, np.float32)
    task = Task(
        *router, 0.5, routed=plugin.routed, asks=True, adds=plugin.setting in ADDED, entry=depth,
        enters_at_head=plugin.entry == "head", taps=plugin.taps, attends=plugin.side.attends,
        corrects_prompt=plugin.edits == "all", eos_ids=(2,), limit=sizes.room, sampling=GREEDY, seed=0, beams=None,
        keep=lambda taps: taps,
    )  # fmt: skip
    room = UNIT * count_units(task.count_slots(sizes.length))
    prompt = [0] * sizes.length
    groups = [Group(task, n, prompt, depth, range(n * room, (n + 1) * room)) for n in range(sizes.rows)]
    for group in groups:
        group.state = np.zeros((1, size.hidden_size), dtype)
    view = power_of_two(room)
    slots = max(view, sizes.rows * room)
    everywhere = NamedSharding(partitioner.mesh, PartitionSpec())
    backbone = lay_out(backbone, lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies))

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree)

    cache = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(partitioner.mesh, partitioner.spec(leaf, "LSKH"))
        )
        for name, leaf in jax.eval_shape(
            lambda: init_shared_cache(size, slots, model.activation_dtype, partitioner)
        ).items()
    }
    entry, last = np.int32(depth), np.int32(depth if task.corrects_prompt else size.num_layers)
    count = part_length([sizes.length])
    of_part: Any = [np.array([number], np.int32) for number in (sizes.length - count, sizes.length)]
    parts = Parts(*of_part)
    places, wishes = (shapes(each) for each in (places_of(groups[:1], view, slots), wishes_of(groups[:1], 2)))
    states = jax.ShapeDtypeStruct((1, count, size.hidden_size), dtype, sharding=everywhere)
    tokens = jax.ShapeDtypeStruct((1, count), jnp.int32, sharding=everywhere)

    @functools.partial(jax.jit, donate_argnums=1)
    def lower(frozen: Params, cache: Any, tokens: Any, wishes: Any, places: Any) -> Any:
        return run_prompts(model, frozen, cache, tokens, parts, wishes, places, entry, last, view=view)

    @functools.partial(jax.jit, donate_argnums=1)
    def finish(frozen: Params, cache: Any, states: Any, g: Any, wishes: Any, places: Any) -> Any:
        answered = np.ones(1, bool)
        return finish_prompts(model, frozen, cache, states, g, answered, parts, wishes, places, entry, view=view)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(frozen: Params, cache: Any, wishes: Any, places: Any, progress: Any) -> Any:
        return run_steps(model, frozen, cache, wishes, places, progress, entry, np.int32(MAX_STEPS), view=view)

    yield _compile(f"{count} tokens of a prompt", lower, backbone.params, cache, tokens, wishes, places)
    if task.corrects_prompt:
        g = jax.ShapeDtypeStruct(states.shape, jnp.float32, sharding=everywhere)
        yield _compile("the same from the entry on", finish, backbone.params, cache, states, g, wishes, places)
    placed = places_of(groups, view, slots)
    arguments = wishes_of(groups, 2), placed, progress_of(groups, placed, view)
    # Whether the lower blocks run at all depends on whether any token is left to run.
    yield _compile("step", step, backbone.params, cache, *shapes(arguments), inner_trips=depth)


def _device(plugin: PluginConfig, partitioner: MeshPartitioner, sizes: Sizes, codec: Codec) -> Compiled:
    one = NamedSharding(jax.sharding.Mesh(partitioner.mesh.devices.reshape(-1)[:1], "device"), PartitionSpec())
    rows, block = sizes.rows, plugin.side.block
    positions, cache = 1, None
    if plugin.side.attends:
        positions = 64
        slots = count_slots(sizes.length, sizes.room, 1)
        cache = jax.eval_shape(lambda: init_cache(block, rows, slots, jnp.dtype(jnp.float32)))
    integers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    taps = _encoded(codec, (rows, positions, len(plugin.side.taps), plugin.hidden_size))
    inputs = SideInput(taps, jax.ShapeDtypeStruct((rows, positions), jnp.int32), integers, integers)  # type: ignore[arg-type]
    arguments = (init_plugin(plugin, abstract=True)["side"], cache, inputs)
    side, cache, inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arguments)
    return _compile("correct", correct, plugin, codec, side, cache, inputs)


def _encoded(codec: Codec, shape: tuple[int, ...]) -> Encoded:
    return jax.eval_shape(lambda: wire.encode(codec, jnp.zeros(shape)))


def _array(partitioner: MeshPartitioner, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.batch_sharding)


def _placed(partitioner: MeshPartitioner, tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        partitioner.param_shardings(tree),
    )


def _compile(name: str, program: Any, *arguments: Any, inner_trips: int | None = None) -> Compiled:
    """Compiles a program; `inner_trips` is as for `cost`."""
    lowered = program.lower(*arguments)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(name, time.perf_counter() - began, None, None, _requested_bytes(str(error)), False, None)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    arguments_and_temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Compiled(name, seconds, *arguments_and_temporaries, peak, True, cost(compiled.as_text(), inner_trips))


def _requested_bytes(message: str) -> int | None:
    """Reads from the compiler's message how many bytes a program would have needed; None if it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if not found:
        return None
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * 1024 ** (" KMGT".index(unit)))
