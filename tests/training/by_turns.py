"""The reference of cached training: the whole backbone run once for each turn of a row, with the corrections of that
turn alone, by plain causal attention and without a cache. Shape letters: B rows, T tokens, R targets of a row, D width,
J turns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.data.pipeline import Batch
from spa_jax.models.block import LlamaConfig
from spa_jax.models.llama import Llama, init_params, normalize_taps
from spa_jax.models.plugin import PluginConfig, correction, init_plugin

LENGTHS = (16, 13, 16, 9, 0)
TURNS = (((3, 4, 5), (9, 10), (14,)), ((0, 1), (7, 8), (11,)), ((2, 3, 4, 5, 6, 7, 8, 9),), ((6,),), ())
"""The predicting positions of each turn of five rows, the last of which is beyond the data."""
LENGTH, WIDTH, MOST_TURNS = 16, 8, 3


def random(tree, seed, scale):
    """Random float32 arrays of the shapes of a tree, so that each part of it says something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), tree)


def make_backbone(config: LlamaConfig):
    """Random parameters with norm weights away from 1."""
    params = random(init_params(config, abstract=True), 1, 0.25)
    norms = {"attention_norm", "mlp_norm", "norm"}

    def around_one(keys, leaf):
        return 1 + leaf if norms & {key.key for key in keys} else leaf

    return jax.tree_util.tree_map_with_path(around_one, params)


def make_rows(vocabulary) -> Batch:
    rng = np.random.default_rng(3)
    flat = [[position for turn in turns for position in turn] for turns in TURNS]
    tokens = np.where(np.arange(LENGTH) < np.array(LENGTHS)[:, None], rng.integers(0, vocabulary, (5, LENGTH)), 0)
    return Batch(
        tokens=tokens.astype(np.int32),
        lengths=np.array(LENGTHS, np.int32),
        predict=np.array([row + [0] * (WIDTH - len(row)) for row in flat], np.int32),
        targets=rng.integers(0, vocabulary, (5, WIDTH)).astype(np.int32),
        weights=np.array([[1] * len(row) + [0] * (WIDTH - len(row)) for row in flat], np.float32),
    )


def corrected_positions(edits) -> np.ndarray:
    """Marks the positions that are corrected when each turn is asked, `[J,B,T]`."""
    if edits == "all":
        return np.ones((1, len(TURNS), LENGTH), bool)
    marks = np.zeros((MOST_TURNS, len(TURNS), LENGTH), bool)
    for row, turns in enumerate(TURNS):
        for number, turn in enumerate(turns):
            marks[number, row, list(turn)] = True
    return marks


def new_tokens() -> np.ndarray:
    """Marks the positions of answers' tokens, which are those that predict a target but for the first one of each turn,
    `[B,T]`."""
    marks = np.zeros((len(TURNS), LENGTH), bool)
    for row, turns in enumerate(TURNS):
        for turn in turns:
            marks[row, list(turn[1:])] = True
    return marks


def every_position() -> jax.Array:
    return jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (len(TURNS), LENGTH))


def run_by_turns(model: Llama, frozen, tokens, marks, replaced):
    """Returns f at the positions that are corrected, each by a run of its own turn, for each of some ways to replace
    the states, `[V,B,T,D]` as the replaced states."""
    runs, ways, turns = (len(replaced) * len(marks), len(tokens), LENGTH), len(replaced), len(marks)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None, None, :], runs).reshape(-1, LENGTH)
    states, _, _ = model.apply({"params": frozen}, jnp.asarray(tokens), every_position(), method="lower")
    mark = jnp.asarray(marks)[None, :, :, :, None]
    entering = jnp.where(mark, replaced[:, None], states[None, None])
    hidden, _ = model.apply({"params": frozen}, entering.reshape(-1, *states.shape[1:]), positions, method="upper")
    return jnp.sum(jnp.where(mark, hidden.reshape(ways, turns, *states.shape), 0), axis=1)


def take(x, predict):
    """Selects `[B,R,...]` from `[B,T,...]`."""
    return jnp.take_along_axis(x, jnp.asarray(predict).reshape(*predict.shape, *[1] * (x.ndim - 2)), axis=1)


def flip_each(predict, replaced, others):
    """Returns states `[R,B,T,D]`, the replaced ones but for one predicting position in each."""
    only = jnp.arange(LENGTH)[None, None, :, None] == predict.T[:, :, None, None]
    return jnp.where(only, others[None], replaced[None])


def take_each(hidden, predict):
    """Selects from `[R,B,T,D]` what stands at that one position in each, `[B,R,D]`."""
    at = jnp.asarray(predict).T[:, :, None, None]
    return jnp.moveaxis(jnp.take_along_axis(hidden, at, axis=2)[:, :, 0], 0, 1)


class Expected(NamedTuple):
    """Losses `[B,R]` in nats by the equations, and sigma and p at the predicting positions."""

    always: jax.Array
    never: jax.Array
    """Nobody is asked, and the offset enters, if there is one."""
    combined: jax.Array
    """Under sigma."""
    mixed: jax.Array
    """With a share of the correction in place of sigma."""
    flipped: jax.Array
    """Under sigma, but for this token itself."""
    sigma: jax.Array
    probability: jax.Array


def expected_outcomes(plugin: PluginConfig, model: Llama, params, frozen, batch: Batch, losses, share=lambda p: p):
    """Computes outcomes by equation 1 of the paper at the entry and whole runs.

    Args:
        plugin, model, params, frozen, batch: what is trained, on what.
        losses: `plain_losses`.
        share: p(consult) -> how much of the correction enters in `mixed`.
    """
    positions, marks = every_position(), corrected_positions(plugin.edits)
    h, taps, _ = model.apply({"params": frozen}, jnp.asarray(batch.tokens), positions, method="lower")
    g, _ = correction(plugin, params, normalize_taps(frozen, model.config, model.taps, taps), positions)
    normal, size = h, jnp.ones((*h.shape[:2], 1))
    if plugin.entry != "head":
        size = jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + model.config.rms_norm_eps)
        normal = h / size * frozen["blocks"]["attention_norm"]["scale"][plugin.entry][None, None, :]
    p = jnp.ones(h.shape[:2])
    if plugin.setting in ("spa", "s2"):
        p = jax.nn.softmax(normal @ params["router"]["kernel"], axis=-1)[:, :, 1]
        if plugin.edits == "all":
            p = jnp.where(jnp.asarray(new_tokens()), p, 1)
    asked = h + size * g if plugin.setting in ("spa", "s1") else size * g
    unasked = h + size * params["router"]["offset"][None, None, :] if plugin.offset else h
    sigma, x = p > plugin.threshold, share(p)[:, :, None]
    taken, other = (jnp.where(s[:, :, None], asked, unasked) for s in (sigma, ~sigma))

    ways = jnp.stack([asked, unasked, taken, x * asked + (1 - x) * h])
    ways = jnp.concatenate([ways, flip_each(batch.predict, taken, other)])
    hidden = run_by_turns(model, frozen, batch.tokens, marks, ways)
    at_targets = [*(take(way, batch.predict) for way in hidden[:4]), take_each(hidden[4:], batch.predict)]
    outcomes = losses(model, frozen, jnp.stack(at_targets), jnp.stack([batch.targets] * 5))
    return Expected(*outcomes, take(sigma, batch.predict), take(p, batch.predict))


def random_plugin(plugin: PluginConfig):
    """Random parameters that move losses by tenths of nats, with folds if asked for."""
    params = random(init_plugin(plugin, abstract=True), 5, 0.3)
    for name in ("norm", "ladder"):  # norm weights around 1, as they are
        if name in params["side"]:
            params["side"][name] = jax.tree_util.tree_map_with_path(
                lambda keys, leaf: 1 + leaf if keys[-1].key == "scale" else leaf, params["side"][name]
            )
    return params
