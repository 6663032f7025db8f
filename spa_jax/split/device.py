"""The device's half: the side network. It needs neither the text nor the backbone, of which reply mode `token` takes
the LM head.

The token-wise kind keeps nothing: a correction is a function of the taps in the message. The kind that attends keeps
its keys and values, and what it keeps after a step is a function of what it kept at the message's `base` and of the
message; so a message may come twice or not at all, a correction may be lost, and both sides still mean the same.

Shape letters: R rows of the generation, M positions of a row, P taps, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spa_jax.data.pipeline import padded_length
from spa_jax.decoding.cache import init_cache, reorder
from spa_jax.decoding.hypotheses import group_keys, token_keys
from spa_jax.decoding.sampling import Sampling, sample
from spa_jax.models.block import PADDING, Cache
from spa_jax.models.combine import Setting, with_correction
from spa_jax.models.llama import Params
from spa_jax.models.plugin import PluginConfig, correction
from spa_jax.split import wire
from spa_jax.split.head import Head, logits
from spa_jax.split.messages_pb2 import Reply, Taps
from spa_jax.split.wire import Codec, Encoded


class Seen(NamedTuple):
    """What a message shows a side network."""

    taps: Encoded
    """`[R,M,P,D]`."""
    positions: Int[Array, "R M"]
    """Of the taps, `PADDING` where there is none."""
    last: Int[Array, " R"]
    """Index of each row's last position."""
    origins: Int[Array, " R"]
    """The row each one goes on from."""


class Choice(NamedTuple):
    """What a device needs to choose a token itself."""

    head: Head
    sampling: Sampling
    seed: int | Int[Array, ""]
    lengths: Int[np.ndarray, " R"]
    """Tokens of each row's prompt."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def correct(
    config: PluginConfig, codec: Codec, side: Params, cache: Cache | None, seen: Seen
) -> tuple[Encoded, Cache | None]:
    """g `[R,D]` at the last of each row's positions, and the cache with all of them added.

    Args:
        config: of the plugin.
        codec: of the wire.
        side: parameters of the side network.
        cache: keys and values of the R rows, of a side network that attends.
        seen: the message.
    """
    g, cache = _g(config, side, cache, seen)
    return wire.encode(codec, g), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def choose_token(
    config: PluginConfig,
    setting: Setting,
    side: Params,
    cache: Cache | None,
    seen: Seen,
    f: Float[Array, "R D"],
    choice: Choice,
) -> tuple[Int[Array, " R"], Cache | None]:
    """The next token of each row, and the cache as of `correct`; drawn by the key that the cloud would draw it by."""
    g, cache = _g(config, side, cache, seen)
    at = jnp.take_along_axis(seen.positions, seen.last[:, None], axis=1)[:, 0]
    keys = token_keys(group_keys(choice.seed, len(choice.lengths)), at - choice.lengths + 1)
    return sample(keys, logits(choice.head, with_correction(setting, f, g)), choice.sampling), cache


def _g(config: PluginConfig, side: Params, cache: Cache | None, seen: Seen) -> tuple[Array, Cache | None]:
    decoded = jnp.moveaxis(wire.decode(seen.taps, jnp.float32), 2, 0)
    g, cache = correction(config, {"side": side}, decoded, seen.positions, reorder(cache, seen.origins))
    return jnp.take_along_axis(g, seen.last[:, None, None], axis=1)[:, 0], cache


class Device:
    """A side network that answers the cloud's questions about one generation."""

    def __init__(
        self,
        config: PluginConfig,
        side: Params,
        codec: Codec,
        rows: int,
        slots: int,
        setting: Setting = "spa",
        choice: Choice | None = None,
    ) -> None:
        """Args:
        config: of the plugin.
        side: parameters of its side network.
        codec: of the wire.
        rows: R of the generation.
        slots: longest prompt and new tokens together.
        setting: of the generation; read with a `choice`.
        choice: to answer with tokens instead of g.
        """
        self._config, self._side, self._codec, self._rows, self._slots = config, side, codec, rows, slots
        self._setting, self._choice = setting, choice
        self._kept: dict[int, Cache | None] = {0: None}
        if config.side.attends:
            self._kept[0] = init_cache(config.side.block, rows, padded_length(slots, 64), jnp.dtype(jnp.float32))

    def receive(self, message: Taps) -> Reply | None:
        """Answers a question; of a part of the prompt it only takes note.

        Raises:
            WireError: the message is not what the protocol says; what is kept stays as it was.
        """
        side, d = self._config.side, self._config.hidden_size
        rows, positions, origins = (
            np.array(part, np.int64) for part in (message.rows, message.positions, message.origins or range(self._rows))
        )
        taps = wire.unpack(self._codec, message.taps, (len(rows), len(side.taps), d))
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
        f = np.zeros((self._rows, d), np.float32)
        if self._choice is not None and not message.prompt:
            f[asked] = wire.unpack("float32", message.f, (len(asked), d)).values
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
        seen = Seen(
            jax.tree.map(spread, taps),
            jnp.asarray(spread(positions.astype(np.int32), PADDING)),
            jnp.asarray(last),
            jnp.asarray(origins, jnp.int32),
        )
        answer, cache = self._answer(self._kept[base], seen, f)
        if message.prompt:
            self._kept = {0: cache}
            return None
        if side.attends:
            self._kept = {base: self._kept[base], message.step: cache}
        told = jax.tree.map(lambda leaf: leaf[asked], jax.device_get(answer))
        if self._choice is not None:
            return Reply(step=message.step, tokens=told.tolist())
        return Reply(step=message.step, g=wire.pack(told))

    def _answer(self, cache: Cache | None, seen: Seen, f: np.ndarray) -> tuple[Encoded | Array, Cache | None]:
        if self._choice is None:
            return correct(self._config, self._codec, self._side, cache, seen)
        return choose_token(self._config, self._setting, self._side, cache, seen, f, self._choice)

    def _makes_sense(self, rows: np.ndarray, positions: np.ndarray) -> bool:
        if len(rows) != len(positions) or not len(rows) or rows.max() >= self._rows or positions.max() >= self._slots:
            return False
        return bool(np.all(np.diff(rows * self._slots + positions) > 0))
