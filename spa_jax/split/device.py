"""The device's half: the side network. It needs neither the text nor the backbone, except for the LM head in reply mode
`token`.

The token-wise kind keeps nothing: a correction is a function of the taps in the message. The kind that attends keeps
its keys and values, and the cache after a step is a function of the cache at the message's `base` and of the message;
so a message may come twice or not at all, a correction may be lost, and both sides still agree.

Shape letters: R rows of the generation, M positions of a row, P taps, D width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spa_jax.data.padding import padded_length
from spa_jax.decoding.cache import init_cache, take_rows
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


class SideInput(NamedTuple):
    """The side network's input, from a message."""

    taps: Encoded
    """`[R,M,P,D]`."""
    positions: Int[Array, "R M"]
    """Positions of the taps, `PADDING` where there is none."""
    last: Int[Array, " R"]
    """Index of each row's last position."""
    origins: Int[Array, " R"]
    """The row whose cache each one continues."""


class TokenChoice(NamedTuple):
    """The LM head and the sampling with which a device chooses tokens itself."""

    head: Head
    sampling: Sampling
    seed: int | Int[Array, ""]
    lengths: Int[np.ndarray, " R"]
    """Tokens of each row's prompt."""


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="everywhere")
def correct(
    config: PluginConfig,
    codec: Codec,
    side: Params,
    cache: Cache | None,
    inputs: SideInput,
    *,
    everywhere: bool = False,
) -> tuple[Encoded, Cache | None]:
    """Computes g `[R,D]` at the last of each row's positions, or `[R,M,D]` everywhere.

    Args:
        config: of the plugin.
        codec: how g travels.
        side: parameters of the side network.
        cache: keys and values of the R rows, of a side network that attends.
        inputs: the message.
        everywhere: whether to return g at all positions.

    Returns:
        Encoded g, and the cache with all positions of the message added.
    """
    g, cache = _correct(config, side, cache, inputs)
    return wire.encode(codec, g if everywhere else _last(g, inputs)), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def choose_token(
    config: PluginConfig,
    setting: Setting,
    side: Params,
    cache: Cache | None,
    inputs: SideInput,
    f: Float[Array, "R D"],
    choice: TokenChoice,
) -> tuple[Int[Array, " R"], Cache | None]:
    """Chooses the next token of each row from f and g, by the random key that the cloud would draw it by.

    Returns:
        Token ids, -1 where a logit is not finite, and the cache as `correct` returns it.
    """
    g, cache = _correct(config, side, cache, inputs)
    g = _last(g, inputs)
    last_position = jnp.take_along_axis(inputs.positions, inputs.last[:, None], axis=1)[:, 0]
    keys = token_keys(group_keys(choice.seed, len(choice.lengths)), last_position - choice.lengths + 1)
    scores = logits(choice.head, with_correction(setting, f, g))
    chosen = sample(keys, scores, choice.sampling)
    return jnp.where(jnp.isfinite(scores).all(axis=-1), chosen, -1), cache


def _correct(
    config: PluginConfig, side: Params, cache: Cache | None, inputs: SideInput
) -> tuple[Float[Array, "R M D"], Cache | None]:
    taps = jnp.moveaxis(wire.decode(inputs.taps, jnp.dtype(jnp.float32)), 2, 0)
    return correction(config, {"side": side}, taps, inputs.positions, take_rows(cache, inputs.origins))


def _last(g: Float[Array, "R M D"], inputs: SideInput) -> Float[Array, "R D"]:
    return jnp.take_along_axis(g, inputs.last[:, None, None], axis=1)[:, 0]


def _finite(answer: Any) -> Any:
    """Returns encoded corrections or chosen tokens.

    Raises:
        WireError: they come of numbers that are not finite.
    """
    if not (wire.is_finite(answer) if isinstance(answer, Encoded) else (answer >= 0).all()):
        raise wire.WireError("the cloud's taps give an answer that is not finite")
    return answer


class Device:
    """A side network that answers the cloud's questions about one generation.

    The device says what it wants generated. It shares no parameter with the cloud, and meets it only in messages:

        >>> from spa_jax import Cloud, load_backbone, load_plugin
        >>> from spa_jax.split.request import device_for, open_message
        >>> plugin = load_plugin("runs/mine/plugin")
        >>> request = open_message(plugin, ["What is thing 3?"], max_new_tokens=8)
        >>> session = Cloud(load_backbone(plugin.backbone)).open(request)
        >>> device = device_for(plugin, request, session.lengths)
        >>> while (question := session.next_question()) is not None:
        ...     session.apply_reply(device.receive(question))
        >>> len(session.result()[0].tokens) <= 8
        True
    """

    def __init__(
        self,
        config: PluginConfig,
        side: Params,
        codec: Codec,
        rows: int,
        slots: int,
        setting: Setting = "spa",
        choice: TokenChoice | None = None,
        most: int = 2**31,
    ) -> None:
        """Creates the cache of a side network that attends.

        Args:
            config: of the plugin.
            side: parameters of its side network.
            codec: how numbers travel.
            rows: R.
            slots: tokens of the longest prompt and most new tokens together.
            setting: of the generation; needed with a `choice`.
            choice: to answer with tokens instead of g.
            most: positions of a row in one message.
        """
        self._config, self._side, self._codec, self._rows, self._slots = config, side, codec, rows, slots
        self._setting, self._choice, self._most = setting, choice, most
        self._caches: dict[int, Cache | None] = {0: None}  # by the step after which they were kept
        if config.side.attends:
            self._caches[0] = init_cache(config.side.block, rows, padded_length(slots, 64), jnp.dtype(jnp.float32))

    def receive(self, message: Taps) -> Reply | None:
        """Answers a question; a part of the prompt is added to the cache, and answered at every position if the cloud
        asks for that.

        Raises:
            WireError: the message is not what the protocol says, or its taps give no finite answer; the cache stays as
                it was.
        """
        side, d = self._config.side, self._config.hidden_size
        rows, positions, origins = (
            np.array(part, np.int64) for part in (message.rows, message.positions, message.origins or range(self._rows))
        )
        taps = wire.unpack(self._codec, message.taps, (len(rows), len(side.taps), d))
        if not self._are_valid(rows, positions):
            raise wire.WireError(f"taps of rows {rows.tolist()} at positions {positions.tolist()} make no sense")
        if len(origins) != self._rows or origins.max() >= self._rows:
            raise wire.WireError(f"rows descend from {origins.tolist()}, and there are {self._rows}")
        base = message.base if side.attends else 0
        if base not in self._caches:
            raise wire.WireError(
                f"step {message.step} builds upon step {base}, and this device keeps {sorted(self._caches)}"
            )
        asked_rows, counts = np.unique(rows, return_counts=True)
        f = np.zeros((self._rows, d), np.float32)
        if self._choice is not None and not message.prompt:
            f[asked_rows] = wire.unpack("float32", message.f, (len(asked_rows), d)).values
        if counts.max() > self._most:
            raise wire.WireError(f"taps of {counts.max()} positions of one row came, where there are {self._most}")
        index = np.concatenate([np.arange(count) for count in counts])
        width = 1
        while width < counts.max():
            width *= 8  # few programs: compiling one in the midst of a generation takes longer than some padding

        def pad(leaf: np.ndarray, fill: int = 0) -> np.ndarray:
            padded = np.full((self._rows, width, *leaf.shape[1:]), fill, leaf.dtype)
            padded[rows, index] = leaf
            return padded

        last = np.zeros(self._rows, np.int32)
        last[asked_rows] = counts - 1
        places: Any = pad(positions.astype(np.int32), PADDING), last, origins.astype(np.int32)
        inputs = SideInput(jax.tree.map(pad, taps), *places)
        if message.prompt:
            arguments = (self._config, self._codec, self._side, self._caches[base], inputs)
            output, cache = correct(*arguments, everywhere=message.step > 0)
            if not message.step:
                self._caches = {0: cache}
                return None
            g = jax.tree.map(lambda leaf: leaf[rows, index], jax.device_get(output))
            reply = Reply(step=message.step, g=wire.pack(_finite(g)))
            self._caches = {0: cache}
            return reply
        output, cache = self._run(self._caches[base], inputs, f)
        answer = jax.tree.map(lambda leaf: leaf[asked_rows], jax.device_get(output))
        if self._choice is not None:
            reply = Reply(step=message.step, tokens=_finite(answer).tolist())
        else:
            reply = Reply(step=message.step, g=wire.pack(_finite(answer)))
        if side.attends:
            self._caches = {base: self._caches[base], message.step: cache}
        return reply

    def _run(self, cache: Cache | None, inputs: SideInput, f: np.ndarray) -> tuple[Encoded | Array, Cache | None]:
        if self._choice is None:
            return correct(self._config, self._codec, self._side, cache, inputs)
        return choose_token(self._config, self._setting, self._side, cache, inputs, f, self._choice)

    def _are_valid(self, rows: np.ndarray, positions: np.ndarray) -> bool:
        """Tells whether they are of this generation, and in ascending order."""
        if len(rows) != len(positions) or not len(rows) or rows.max() >= self._rows or positions.max() >= self._slots:
            return False
        return bool(np.all(np.diff(rows * self._slots + positions) > 0))
