"""Sources of batches: what is computed of examples once, kept, and collated into the batch of a step."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import Batch, collate, padded_shapes, plan_batches, prefetched
from spa_jax.errors import UserError
from spa_jax.models.llama import Llama, Params
from spa_jax.models.partitioner import Partitioner
from spa_jax.models.plugin import PluginConfig
from spa_jax.training.config import TapCacheConfig
from spa_jax.training.features import AT_TARGETS, Features, Kept, extract, kept_for, run_prefix
from spa_jax.training.processes import barrier
from spa_jax.training.progress import progress_bar
from spa_jax.training.tap_cache import FeatureSpec, TapCache
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import cache_directory

log = logging.getLogger(__name__)

Collate = Callable[[Sequence[Example], Int[np.ndarray, " B"], tuple[int, int]], Any]
"""(examples, rows, padded shape) -> a batch of NumPy arrays; see `spa_jax.data.pipeline.collate`."""


class Source:
    """A source that computes nothing: its batches are tokens.

    Attributes:
        cached: whether something is kept on disk, for later runs too.
    """

    cached = False

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples that `fill` would run the backbone over."""
        return []

    def fill(self, examples: Sequence[Example]) -> None:
        """Runs the backbone over the examples of which something is kept and nothing is there yet."""

    def collate(self, examples: Sequence[Example], rows: Int[np.ndarray, " B"], shape: tuple[int, int]) -> Any:
        """Makes the batch of these rows, padded to the shape; a row of -1 has no weight anywhere."""
        return collate(examples, rows, shape)


class ScoredBatch(NamedTuple):
    """Tokens, and the loss of the backbone alone."""

    batch: Batch
    base_loss: Float[np.ndarray, "B R"]
    """Cross-entropy in nats, float32."""


class ScoredTokens(Source):
    """Tokens with the loss of the backbone alone, which is kept in memory."""

    def __init__(self, model: Llama, frozen: Params, batch_size: int) -> None:
        self._model, self._frozen, self._batch_size = model, frozen, batch_size
        self._base_losses: dict[str, np.ndarray] = {}

    def fill(self, examples: Sequence[Example]) -> None:
        for index, features in run_backbone(self._model, self._frozen, self._batch_size, examples):
            self._base_losses[examples[index].digest] = np.asarray(features.base_loss)

    def collate(self, examples: Sequence[Example], rows: Int[np.ndarray, " B"], shape: tuple[int, int]) -> ScoredBatch:
        batch = collate(examples, rows, shape)
        base_loss = np.zeros_like(batch.weights)
        for i, row in enumerate(rows):
            if row >= 0:
                loss = self._base_losses[examples[row].digest]
                base_loss[i, : len(loss)] = loss
        return ScoredBatch(batch, base_loss)


class CachedFeatures(Source):
    """Features of the frozen backbone from a tap cache on disk, see `spa_jax.training.tap_cache`."""

    cached = True

    def __init__(self, cache: TapCache, model: Llama, frozen: Params, batch_size: int) -> None:
        self.cache, self._model, self._frozen, self._batch_size = cache, model, frozen, batch_size

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        return self.cache.missing(examples)

    def fill(self, examples: Sequence[Example]) -> None:
        """Runs the backbone over the examples the cache does not hold; of several processes each keeps its own rows.

        Raises:
            UserError: several processes do not share the directory.
        """
        cache = self.cache
        barrier("the tap cache is open")
        todo = cache.missing(examples)
        log.info("tap cache %s: %d examples to compute", cache.directory, len(todo))
        kept, dtype = cache.spec.kept, cache.spec.keys_dtype
        cache.build(
            todo, lambda missing: run_backbone(self._model, self._frozen, self._batch_size, missing, kept, dtype)
        )
        barrier("the tap cache is built")
        cache.refresh()
        if cache.missing(examples):
            raise UserError(
                f"the processes do not see each other's part of the tap cache in '{cache.directory}': set "
                "tap_cache.directory to one that all of them share, or tap_cache.enabled=false"
            )

    def collate(self, examples: Sequence[Example], rows: Int[np.ndarray, " B"], shape: tuple[int, int]) -> Features:
        return self.cache.collate(examples, rows, shape)


def open_tap_cache(
    options: TapCacheConfig, model: Llama, plugin: PluginConfig, backbone: Backbone, examples: Sequence[Example]
) -> TapCache | None:
    """Opens the tap cache of a plugin's features, and chooses by their size what is kept; that changes only speed.

    Args:
        options: where the caches of all backbones are, and their largest size.
        model: the backbone's program with the taps that are cached.
        plugin: what is trained.
        backbone: whose features these are.
        examples: what is to be cached; nothing is computed yet.

    Returns:
        The cache; None where corrections enter in front of an inner block and even the states there would not fit.

    Raises:
        UserError: the directory cannot be used, or the features of a plugin at `head` would not fit.
    """
    if "://" in options.directory:
        raise UserError(
            f"tap_cache.directory='{options.directory}' is in a bucket, and a tap cache is read in random order: "
            "name a directory that all processes share (a network file system), or set tap_cache.enabled=false"
        )
    root = Path(options.directory or cache_directory() / "taps")
    for keys in (True, False) if plugin.entry != "head" and plugin.edits == "targets" else (True,):
        kept = kept_for(plugin, keys)
        cache = TapCache(
            root, FeatureSpec.for_model(backbone.identity, model, kept, options.dtype or backbone.dtype.name)
        )
        need = cache.needed_bytes(examples)
        what = "taps" + (" and keys and values" if kept.keys else " and states" if kept.states_everywhere else "")
        if cache.has_room(need, options.limit_gib):
            log.info("tap cache %s: keeps %s", cache.directory, what)
            return cache
        if plugin.entry == "head":
            cache.check_room(examples, options.limit_gib)
        log.warning(
            "a tap cache of %s has no room: it would need %.3g GiB (tap_cache.limit_gib is %g)", what, need / 2**30,
            options.limit_gib,
        )  # fmt: skip
    log.warning("no tap cache: the backbone runs in every step")
    return None


def load_batches(
    batches: grain.MapDataset, partitioner: Partitioner, source: Collate, examples: Sequence[Example]
) -> Iterator[tuple[Int[np.ndarray, " b"], Any]]:
    """Loads planned batches ahead of their use, as `(rows, batch)`: the rows that this process has to load, and what
    `source` makes of them, as NumPy arrays.

    Args:
        batches: indices of the examples that make up each batch, see `plan_batches`.
        partitioner: says which rows this process has to load.
        source: collates rows.
        examples: all of them.
    """

    shapes = padded_shapes(examples, len(batches[0])) if len(batches) else []

    def load(rows: Int[np.ndarray, " B"]) -> tuple[np.ndarray, Any]:
        local = rows[partitioner.local_rows(len(rows))]
        return local, source(examples, local, shapes[rows[0]])

    return prefetched(batches.map(load))


def run_backbone(
    model: Llama,
    frozen: Params,
    batch_size: int,
    examples: Sequence[Example],
    kept: Kept = AT_TARGETS,
    keys_dtype: str | None = None,
) -> Iterator[tuple[int, Features]]:
    """Runs the backbone over examples, one batch after another, and yields `(index, features of that example)` as
    NumPy arrays; of several processes each gets those of its own rows.

    Tokens that all examples begin with, such as a chat's system prompt, are run once.
    """
    prefix, common = None, common_prefix(examples)
    if len(common):
        prefix = _run_prefix(model, frozen, jnp.asarray(common)[None, :])
    steps, partitioner = plan_batches(examples, batch_size), model.partitioner
    pending = None
    with progress_bar() as bar:
        batches = load_batches(steps, partitioner, collate, examples)
        for rows, batch in bar.track(_with_sentinel(batches), total=len(steps), description="backbone pass"):
            dispatched = None
            if batch is not None:
                dispatched = rows, _extract(model, frozen, partitioner.shard_batch(batch), kept, prefix, keys_dtype)
            if pending is not None:
                chosen, features = pending[0], partitioner.to_local(pending[1])
                for i, row in enumerate(chosen):
                    if row >= 0:
                        yield int(row), jax.tree.map(lambda leaf, i=i: leaf[i], features)
            pending = dispatched


_extract = jax.jit(extract, static_argnums=(0, 3, 5))
_run_prefix = jax.jit(run_prefix, static_argnums=0)


def common_prefix(examples: Sequence[Example]) -> Int[np.ndarray, " C"]:
    """Returns the tokens, int32, that all examples begin with and none of which predicts a target."""
    if not examples:
        return np.array([], np.int32)
    first = examples[0].tokens
    length = min(int(example.predict[0]) for example in examples)
    for example in examples:
        differs = np.flatnonzero(example.tokens[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return first[:length]


def _with_sentinel(batches: Iterator[tuple[np.ndarray, Any]]) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields the batches and then one that is none, so that the loop has a turn for the last batch's features."""
    yield from batches
    yield np.array([], np.int32), None
