"""Cross-entropy through the frozen LM head without an array of positions times vocabulary.

The head is frozen, so the gradient with respect to the hidden state is all there is, and it can be computed in the same
pass over a chunk of positions as the loss: nothing of size V outlives its chunk, and nothing is computed twice.
Shape letters: M positions, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spa_jax.models.llama import Llama, Params

CHUNK = 256
"""Most positions whose logits exist at one time."""


def token_losses(
    model: Llama, params: Params, hidden: Float[Array, "*M D"], targets: Int[Array, "*M"]
) -> Float[Array, "*M"]:
    """-log softmax(LM head(hidden))[target] in nats, float32; differentiable in `hidden` alone."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _losses(model, params, flat, targets.reshape(-1)).reshape(targets.shape)


def best_tokens(model: Llama, params: Params, hidden: Float[Array, "*M D"]) -> Int[Array, "*M"]:
    """The likeliest token by LM head, int32."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunks, _ = _chunks(flat, jnp.zeros(len(flat), jnp.int32))
    best = jax.lax.map(lambda h: jnp.argmax(model.apply({"params": params}, h, method="logits"), axis=-1), chunks)
    return best.reshape(-1)[: len(flat)].reshape(hidden.shape[:-1]).astype(jnp.int32)


def _chunks(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = hidden.shape[0]
    size = -(-count // -(-count // CHUNK))  # of equal chunks, so that little is padded
    padding = -count % size
    hidden, targets = jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(targets, (0, padding))
    return hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size)


def _chunk_loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    return normalizer - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], normalizer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(model: Llama, params: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    def chunk(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, t = xs
        return _chunk_loss(model.apply({"params": params}, h, method="logits"), t)[0]

    return jax.lax.map(chunk, _chunks(hidden, targets)).reshape(-1)[: hidden.shape[0]]


def _forward(model: Llama, params: Params, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    def chunk(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, t = xs
        logits, pull_back = jax.vjp(lambda x: model.apply({"params": params}, x, method="logits"), h)
        losses, normalizer = _chunk_loss(logits, t)
        softmax = jnp.exp(logits - normalizer[:, None])
        (gradient,) = pull_back(softmax - jax.nn.one_hot(t, logits.shape[-1], dtype=logits.dtype))
        return losses, gradient

    losses, gradient = jax.lax.map(chunk, _chunks(hidden, targets))
    count = hidden.shape[0]
    return losses.reshape(-1)[:count], gradient.reshape(-1, hidden.shape[-1])[:count]


def _backward(model: Llama, gradient: jax.Array, cotangent: jax.Array) -> tuple[None, jax.Array, None]:
    return None, (cotangent[:, None] * gradient).astype(gradient.dtype), None


_losses.defvjp(_forward, _backward)
