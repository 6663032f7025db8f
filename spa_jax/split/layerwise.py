"""LoRA and Adapter as in the paper's Table 2: their parameters on the device, the layers in the cloud.

Every layer takes exchanges: one for LoRA (Hu et al. 2022), where the attention's input goes down to the device and what
it adds to queries and values comes up; two for Adapter (Houlsby et al. 2019), where the outputs of attention and of the
feed-forward layer go down in turn and what the device adds to each comes up. Greedy decoding of one prompt.

Shape letters: T query length, D width, W numbers that an exchange adds to a position.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spa_jax.data.padding import padded_length
from spa_jax.decoding.cache import init_cache
from spa_jax.errors import UserError
from spa_jax.models.block import (
    PADDING,
    Block,
    Cache,
    LlamaConfig,
    place_by_position,
    rope_angles,
)
from spa_jax.models.llama import Llama, Params, take_layer
from spa_jax.models.peft import SUBLAYERS, Peft, PeftConfig, added, widths
from spa_jax.models.quantized import dequantize, need_floats
from spa_jax.split import wire
from spa_jax.split.channel import Channel, Traffic
from spa_jax.split.messages_pb2 import Layer, Reply
from spa_jax.split.wire import Codec, Encoded
from spa_jax.weights.backbone import Backbone


def exchanged_outputs(config: PeftConfig) -> tuple[tuple[str, ...], ...]:
    """Names the outputs in a block that the device adds to, for each exchange of a layer.

    Raises:
        UserError: a LoRA on more than the attention's input, which would take more exchanges than are made.
    """
    if config.setting == "adapter":
        return tuple((name,) for name in SUBLAYERS)
    if other := set(config.targets) - {"q", "k", "v"}:
        raise UserError(f"over a channel LoRA works on q, k and v, not on {', '.join(sorted(other))}")
    return (config.targets,)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def answer_layer(
    config: PeftConfig, codec: Codec, place: int, params: Params, layer: Int[Array, ""], x: Encoded
) -> Encoded:
    """Computes the device's part of an exchange from x `[T,D]`: what it adds to each output, side by side."""
    decoded = wire.decode(x, jnp.float32)
    adapters = take_layer(params, layer)
    parts = [added(config, adapters[name], decoded) for name in exchanged_outputs(config)[place]]
    return wire.encode(codec, jnp.concatenate(parts, axis=-1))


class LayerwiseDevice:
    """A LoRA or Adapter that answers the layers of a cloud."""

    def __init__(self, peft: Peft, backbone: LlamaConfig, codec: Codec) -> None:
        self._peft, self._backbone, self._codec = peft, backbone, codec

    def answer(self, message: bytes) -> bytes:
        """Answers a `Layer` message with a `Reply`.

        Raises:
            WireError: the bytes are no such message.
        """
        request = Layer.FromString(message)
        config = self._peft.config
        if request.layer >= self._backbone.num_layers or request.place >= len(exchanged_outputs(config)):
            raise wire.WireError(f"there is no adapter {request.place} in layer {request.layer}")
        x = wire.unpack(self._codec, request.x, (request.count, self._backbone.hidden_size))
        addition = answer_layer(config, self._codec, request.place, self._peft.params, np.int32(request.layer), x)
        return Reply(step=request.step, g=wire.pack(wire.to_host(addition))).SerializeToString()


class LayerwiseCloud:
    """A backbone that asks a device at every layer."""

    def __init__(self, backbone: Backbone, config: PeftConfig, codec: Codec, channel: Channel) -> None:
        need_floats(backbone.params, "LoRA or Adapter on a device")
        self._backbone, self._config, self._codec, self._channel = backbone, config, codec, channel
        self._step = 0

    def generate(self, prompt: list[int], max_new_tokens: int) -> tuple[list[int], Traffic]:
        """Generates greedily, past any EOS; returns the new tokens and the traffic, in which the prompt's exchanges, by
        which the first token is chosen, are those of the opening."""
        c = self._backbone.config
        slots = padded_length(len(prompt) + max_new_tokens, 64)
        cache: Cache | None = init_cache(c, 1, slots, jnp.dtype(jnp.float32))
        width = padded_length(len(prompt), 32)
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(prompt)] = prompt
        positions = np.where(np.arange(width) < len(prompt), np.arange(width), PADDING)[None].astype(np.int32)
        traffic = self._channel.traffic = Traffic()
        token, cache = self._run(tokens, positions, len(prompt), cache)
        traffic.end_opening()
        new = [token]
        for position in range(len(prompt), len(prompt) + max_new_tokens - 1):
            token, cache = self._run(np.array([[token]], np.int32), np.array([[position]], np.int32), 1, cache)
            new.append(token)
        return new, traffic

    def _run(
        self, tokens: np.ndarray, positions: np.ndarray, count: int, cache: Cache | None
    ) -> tuple[int, Cache | None]:
        c, frozen = self._backbone.config, self._backbone.params
        h = frozen["embed"]["embedding"][jnp.asarray(tokens)]
        for index in range(c.num_layers):
            layer = np.int32(index)
            if self._config.setting == "lora":
                addition = self._ask(index, 0, _attention_input(c, frozen, layer, h), count)
                h, cache = _lora_block(c, self._config.targets, frozen, layer, h, addition, positions, cache)
            else:
                x, cache = _attend(c, frozen, layer, h, positions, cache)
                h = h + x + self._ask(index, 0, x, count)
                x = _feed_forward(c, frozen, layer, h)
                h = h + x + self._ask(index, 1, x, count)
        return int(_next_token(c, frozen, h, np.int32(count - 1))), cache

    def _ask(self, layer: int, place: int, x: Float[Array, "1 T D"], count: int) -> Float[Array, "1 T W"]:
        self._step += 1
        encoded = wire.to_host(wire.encode(self._codec, x[0, :count]))
        message = Layer(step=self._step, layer=layer, place=place, count=count, x=wire.pack(encoded))
        reply = self._channel.exchange(message.SerializeToString())
        width = sum(widths(name, self._backbone.config)[1] for name in exchanged_outputs(self._config)[place])
        if reply is None:  # what is lost adds nothing
            return jnp.zeros((1, x.shape[1], width))
        addition = wire.unpack(self._codec, Reply.FromString(reply).g, (count, width))
        decoded = wire.decode(cast(Encoded, jax.tree.map(jnp.asarray, addition)), jnp.dtype(jnp.float32))
        return jnp.pad(decoded, ((0, x.shape[1] - count), (0, 0)))[None]


def _block(c: LlamaConfig, frozen: Params, layer: Int[Array, ""]) -> Block:
    """Binds a block of the backbone to its parameters."""
    return Block(c, jnp.dtype(jnp.float32)).bind({"params": dequantize(take_layer(frozen["blocks"], layer))})


@functools.partial(jax.jit, static_argnums=0)
def _attention_input(
    c: LlamaConfig, frozen: Params, layer: Int[Array, ""], h: Float[Array, "1 T D"]
) -> Float[Array, "1 T D"]:
    return _block(c, frozen, layer).attention_norm(h)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _lora_block(
    c: LlamaConfig,
    targets: tuple[str, ...],
    frozen: Params,
    layer: Int[Array, ""],
    h: Float[Array, "1 T D"],
    addition: Float[Array, "1 T W"],
    positions: Int[Array, "1 T"],
    cache: Cache | None,
) -> tuple[Float[Array, "1 T D"], Cache | None]:
    """Runs a whole block; what the device adds to each of the targets lies side by side in `addition`."""
    ends = np.cumsum([widths(name, c)[1] for name in targets])
    additions = dict(zip(targets, jnp.split(addition, ends[:-1], axis=-1)))

    def add(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return y + additions[name].reshape(y.shape) if name in additions else y

    places = place_by_position(positions, cache)
    return _block(c, frozen, layer)(h, cache, layer, rope_angles(c, positions), places, add)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _attend(
    c: LlamaConfig,
    frozen: Params,
    layer: Int[Array, ""],
    h: Float[Array, "1 T D"],
    positions: Int[Array, "1 T"],
    cache: Cache | None,
) -> tuple[Float[Array, "1 T D"], Cache | None]:
    places = place_by_position(positions, cache)
    return _block(c, frozen, layer).attend(h, cache, layer, rope_angles(c, positions), places)


@functools.partial(jax.jit, static_argnums=0)
def _feed_forward(
    c: LlamaConfig, frozen: Params, layer: Int[Array, ""], h: Float[Array, "1 T D"]
) -> Float[Array, "1 T D"]:
    return _block(c, frozen, layer).feed_forward(h)


@functools.partial(jax.jit, static_argnums=0)
def _next_token(c: LlamaConfig, frozen: Params, h: Float[Array, "1 T D"], last: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the likeliest token after the one at index `last`."""
    llama = Llama(c).bind({"params": frozen})
    return jnp.argmax(llama.logits(llama.final_norm(h[:, last]))[0])
