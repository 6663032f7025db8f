"""The device's half: the side network. It needs neither the backbone nor the text.

The token-wise kind keeps nothing: a correction is a function of the taps in the message. The kind that attends keeps
its keys and values, and what it keeps after a step is a function of what it kept at the message's `base` and of the
message; so a message may come twice or not at all, a correction may be lost, and both sides still mean the same.

Shape letters: R rows, M positions of a message, P taps, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spa_jax.data.pipeline import bucket
from spa_jax.decoding.cache import init_cache, reorder
from spa_jax.models.llama import PADDING, Cache, Params
from spa_jax.models.plugin import PluginConfig, correction
from spa_jax.split import wire
from spa_jax.split.messages_pb2 import Correction, Taps
from spa_jax.split.wire import Codec, Encoded


@functools.partial(jax.jit, static_argnums=(0, 1))
def correct(config: PluginConfig, codec: Codec, side: Params, taps: Encoded) -> Encoded:
    """g `[M,D]` of a token-wise side network at positions whose taps are `[M,P,D]`."""
    decoded = jnp.moveaxis(wire.decode(taps, jnp.float32), 1, 0)[:, :, None]
    g, _ = correction(config, {"side": side}, decoded, jnp.zeros((decoded.shape[1], 1), jnp.int32))
    return wire.encode(codec, g[:, 0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(
    config: PluginConfig,
    codec: Codec,
    side: Params,
    cache: Cache,
    origins: Int[Array, " R"],
    taps: Encoded,
    positions: Int[Array, "R M"],
    last: Int[Array, " R"],
) -> tuple[Encoded, Cache]:
    """g `[R,D]` at index `last` of each row's positions, of a side network that attends.

    Args:
        config: of the plugin.
        codec: of the wire.
        side: parameters of the side network.
        cache: its keys and values of the R rows.
        origins: the row each one goes on from.
        taps: `[R,M,P,D]`.
        positions: of the taps, `PADDING` where there is none.
        last: index of each row's last position.

    Returns:
        g, and the cache with these positions added.
    """
    cache = reorder(cache, origins)
    decoded = jnp.moveaxis(wire.decode(taps, jnp.float32), 2, 0)
    g, added = correction(config, {"side": side}, decoded, positions, cache)
    chosen: Float[Array, "R 1 D"] = jnp.take_along_axis(g, last[:, None, None], axis=1)
    assert added is not None
    return wire.encode(codec, chosen[:, 0]), added


class Device:
    """A side network that answers the cloud's questions about one generation."""

    def __init__(self, config: PluginConfig, side: Params, codec: Codec, rows: int, slots: int) -> None:
        """Args:
        config: of the plugin.
        side: parameters of its side network.
        codec: of the wire.
        rows: R of the generation.
        slots: longest prompt and new tokens together; for a side network that attends.
        """
        self._config, self._side, self._codec, self._rows, self._slots = config, side, codec, rows, slots
        self._kept: dict[int, Cache] = {}
        if config.side.attends:
            self._kept[0] = init_cache(config.side.block, rows, bucket(slots, 64), jnp.dtype(jnp.float32))
        self._answered: Correction | None = None

    def receive(self, message: Taps) -> Correction | None:
        """Answers a question; of a part of the prompt it only takes note.

        Raises:
            WireError: the message is not what the protocol says; what is kept stays as it was.
        """
        last = self._answered
        if last is not None and message.step == last.step and not message.prompt:
            return last
        count, side = len(message.rows), self._config.side
        rows, positions = np.array(message.rows, np.int32), np.array(message.positions, np.int32)
        shape = (count, len(side.taps), self._config.hidden_size)
        taps = wire.unpack(self._codec, message.taps, shape)
        if count == 0 or len(positions) != count or rows.max() >= self._rows or positions.max() >= self._slots:
            raise wire.WireError(f"taps of rows {rows.tolist()} at positions {positions.tolist()} make no sense")
        g = self._attend(message, rows, positions, taps) if side.attends else self._correct(taps, count)
        if message.prompt or g is None:
            return None
        self._answered = Correction(step=message.step, g=wire.pack(g))
        return self._answered

    def _correct(self, taps: Encoded, count: int) -> Encoded:
        padded = jax.tree.map(lambda leaf: _pad(leaf, bucket(count, 1)), taps)
        g = wire.to_host(correct(self._config, self._codec, self._side, padded))
        return jax.tree.map(lambda leaf: leaf[:count], g)

    def _attend(self, message: Taps, rows: np.ndarray, positions: np.ndarray, taps: Encoded) -> Encoded | None:
        if message.base not in self._kept or len(message.origins) not in (0, self._rows):
            raise wire.WireError(
                f"step {message.step} builds upon step {message.base}, and this device keeps {sorted(self._kept)}"
            )
        origins = np.array(message.origins or range(self._rows), np.int32)
        if origins.max() >= self._rows:
            raise wire.WireError(f"rows descend from {origins.tolist()}, and there are {self._rows}")
        asked, counts = np.unique(rows, return_counts=True)
        index = np.concatenate([np.arange(count) for count in counts])
        if not np.array_equal(rows, np.repeat(asked, counts)):
            raise wire.WireError(f"rows {rows.tolist()} are not in order")
        width = bucket(int(counts.max()), 1)
        where = np.full((self._rows, width), PADDING, np.int32)
        where[rows, index] = positions
        last = np.zeros(self._rows, np.int32)
        last[asked] = counts - 1

        def spread(leaf: np.ndarray) -> np.ndarray:
            whole = np.zeros((self._rows, width, *leaf.shape[1:]), leaf.dtype)
            whole[rows, index] = leaf
            return whole

        g, cache = attend(
            self._config,
            self._codec,
            self._side,
            self._kept[message.base],
            origins,
            jax.tree.map(spread, taps),
            where,
            last,
        )
        if message.prompt:
            self._kept = {0: cache}
            return None
        self._kept = {message.base: self._kept[message.base], message.step: cache}
        return jax.tree.map(lambda leaf: leaf[asked], wire.to_host(g))


def _pad(leaf: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([leaf, np.zeros((length - len(leaf), *leaf.shape[1:]), leaf.dtype)])
