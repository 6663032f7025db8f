"""The device's half: the side network. It needs neither the backbone nor the text.

The token-wise kind keeps nothing: a correction is a function of the taps in the message. The kind that attends keeps
its keys and values, and what it keeps after a step is a function of what it kept at the message's `base` and of the
message; so a message may come twice or not at all, a correction may be lost, and both sides still mean the same.

Shape letters: R rows of the generation, M positions of a row, P taps, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from spa_jax.data.pipeline import bucket
from spa_jax.decoding.cache import init_cache, reorder
from spa_jax.models.llama import PADDING, Cache, Params
from spa_jax.models.plugin import PluginConfig, correction
from spa_jax.split import wire
from spa_jax.split.messages_pb2 import Correction, Taps
from spa_jax.split.wire import Codec, Encoded


@functools.partial(jax.jit, static_argnums=(0, 1))
def correct(
    config: PluginConfig,
    codec: Codec,
    side: Params,
    cache: Cache | None,
    origins: Int[Array, " R"],
    taps: Encoded,
    positions: Int[Array, "R M"],
    last: Int[Array, " R"],
) -> tuple[Encoded, Cache | None]:
    """g `[R,D]` at index `last` of each row's positions.

    Args:
        config: of the plugin.
        codec: of the wire.
        side: parameters of the side network.
        cache: keys and values of the R rows, of a side network that attends.
        origins: the row each one goes on from.
        taps: `[R,M,P,D]`.
        positions: of the taps, `PADDING` where there is none.
        last: index of each row's last position.

    Returns:
        g, and the cache with these positions added.
    """
    decoded = jnp.moveaxis(wire.decode(taps, jnp.float32), 2, 0)
    g, cache = correction(config, {"side": side}, decoded, positions, reorder(cache, origins))
    return wire.encode(codec, jnp.take_along_axis(g, last[:, None, None], axis=1)[:, 0]), cache


class Device:
    """A side network that answers the cloud's questions about one generation."""

    def __init__(self, config: PluginConfig, side: Params, codec: Codec, rows: int, slots: int) -> None:
        """Args:
        config: of the plugin.
        side: parameters of its side network.
        codec: of the wire.
        rows: R of the generation.
        slots: longest prompt and new tokens together.
        """
        self._config, self._side, self._codec, self._rows, self._slots = config, side, codec, rows, slots
        self._kept: dict[int, Cache | None] = {0: None}
        if config.side.attends:
            self._kept[0] = init_cache(config.side.block, rows, bucket(slots, 64), jnp.dtype(jnp.float32))

    def receive(self, message: Taps) -> Correction | None:
        """Answers a question; of a part of the prompt it only takes note.

        Raises:
            WireError: the message is not what the protocol says; what is kept stays as it was.
        """
        side = self._config.side
        rows, positions, origins = (
            np.array(part, np.int64) for part in (message.rows, message.positions, message.origins or range(self._rows))
        )
        taps = wire.unpack(self._codec, message.taps, (len(rows), len(side.taps), self._config.hidden_size))
        if not self._makes_sense(rows, positions):
            raise wire.WireError(f"taps of rows {rows.tolist()} at positions {positions.tolist()} make no sense")
        if len(origins) != self._rows or origins.max() >= self._rows:
            raise wire.WireError(f"rows descend from {origins.tolist()}, and there are {self._rows}")
        base = message.base if side.attends else 0
        if base not in self._kept:
            raise wire.WireError(
                f"step {message.step} builds upon step {base}, and this device keeps {sorted(self._kept)}"
            )
        asked, counts = np.unique(rows, return_counts=True)
        index = np.concatenate([np.arange(count) for count in counts])
        width = 1
        while width < counts.max():
            width *= 8  # few programs: compiling one in the midst of a generation takes longer than some padding

        def spread(leaf: np.ndarray, fill: int = 0) -> np.ndarray:
            whole = np.full((self._rows, width, *leaf.shape[1:]), fill, leaf.dtype)
            whole[rows, index] = leaf
            return whole

        last = np.zeros(self._rows, np.int32)
        last[asked] = counts - 1
        g, cache = correct(
            self._config,
            self._codec,
            self._side,
            self._kept[base],
            origins.astype(np.int32),
            jax.tree.map(spread, taps),
            spread(positions.astype(np.int32), PADDING),
            last,
        )
        if message.prompt:
            self._kept = {0: cache}
            return None
        if side.attends:
            self._kept = {base: self._kept[base], message.step: cache}
        told = jax.tree.map(lambda leaf: leaf[asked], wire.to_host(g))
        return Correction(step=message.step, g=wire.pack(told))

    def _makes_sense(self, rows: np.ndarray, positions: np.ndarray) -> bool:
        if len(rows) != len(positions) or not len(rows) or rows.max() >= self._rows or positions.max() >= self._slots:
            return False
        return bool(np.all(np.diff(rows * self._slots + positions) > 0))
