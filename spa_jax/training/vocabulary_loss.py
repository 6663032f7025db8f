"""Cross-entropy through the frozen LM head without an array of positions times vocabulary.

The head is frozen, so the gradient with respect to the hidden state is all there is, and it can be computed in the same
pass over a chunk of positions as the loss: nothing of size V outlives its chunk, and nothing is computed twice.
Shape letters: M positions, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from spa_jax.models.llama import Llama, Params
from spa_jax.models.partitioner import Partitioner

CHUNK = 256
"""The most positions of each part of the batch whose logits exist at one time."""


def token_losses(
    model: Llama, params: Params, hidden: Float[Array, "*M D"], targets: Int[Array, "*M"]
) -> Float[Array, "*M"]:
    """Computes -log softmax(LM head(hidden))[target] in nats, float32; differentiable in `hidden` alone."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _losses(model, _head(model, params), flat, targets.reshape(-1)).reshape(targets.shape)


def best_tokens(model: Llama, params: Params, hidden: Float[Array, "*M D"]) -> Int[Array, "*M"]:
    """Returns the token with the largest logit at each position, int32."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    head = _head(model, params)
    best = jax.lax.map(lambda h: jnp.argmax(_logits(model, head, h), axis=-1), _chunk(model.partitioner, flat))
    return _unchunk(model.partitioner, best, len(flat)).reshape(hidden.shape[:-1]).astype(jnp.int32)


def _head(model: Llama, params: Params) -> Params:
    """Selects the LM head's parameters and splits them by V alone, so that they are gathered once and not by chunk."""
    name, axes = ("embed", "VD") if model.config.tie_word_embeddings else ("lm_head", "DV")
    return {name: jax.tree.map(lambda leaf: model.partitioner.constrain(leaf, axes), params[name])}


def _chunk(partitioner: Partitioner, x: Shaped[Array, "M ..."]) -> Shaped[Array, "chunks size ..."]:
    """Divides positions into equal chunks, so that little is padded. Every chunk takes as many from each part of the
    batch, and so keeps all devices busy."""
    parts = partitioner.batch_parts if x.shape[0] % partitioner.batch_parts == 0 else 1
    count = x.shape[0] // parts
    size = -(-count // -(-count // CHUNK))
    x = x.reshape(parts, count, *x.shape[1:])
    x = jnp.pad(x, ((0, 0), (0, -count % size), *[(0, 0)] * (x.ndim - 2)))
    x = jnp.moveaxis(x.reshape(parts, -1, size, *x.shape[2:]), 1, 0)
    return partitioner.constrain(x.reshape(-1, parts * size, *x.shape[3:]), ".B")


def _unchunk(partitioner: Partitioner, x: Shaped[Array, "chunks size ..."], total: int) -> Shaped[Array, "M ..."]:
    """Undoes `_chunk` for `total` positions."""
    parts = partitioner.batch_parts if total % partitioner.batch_parts == 0 else 1
    x = jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)
    x = x.reshape(parts, -1, *x.shape[3:])[:, : total // parts]
    return partitioner.constrain(x.reshape(total, *x.shape[2:]), "B")


def _chunk_loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    return normalizer - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], normalizer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(model: Llama, params: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    def chunk(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, t = xs
        return _chunk_loss(_logits(model, params, h), t)[0]

    partitioner = model.partitioner
    losses = jax.lax.map(chunk, (_chunk(partitioner, hidden), _chunk(partitioner, targets)))
    return _unchunk(partitioner, losses, hidden.shape[0])


def _logits(model: Llama, params: Params, hidden: jax.Array) -> jax.Array:
    return model.partitioner.constrain(model.apply({"params": params}, hidden, method="logits"), "BV")


def _forward(model: Llama, params: Params, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    def chunk(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, t = xs
        logits, pull_back = jax.vjp(lambda x: _logits(model, params, x), h)
        losses, normalizer = _chunk_loss(logits, t)
        softmax = jnp.exp(logits - normalizer[:, None])
        (gradient,) = pull_back(softmax - jax.nn.one_hot(t, logits.shape[-1], dtype=logits.dtype))
        return losses, gradient

    partitioner, total = model.partitioner, hidden.shape[0]
    losses, gradient = jax.lax.map(chunk, (_chunk(partitioner, hidden), _chunk(partitioner, targets)))
    return _unchunk(partitioner, losses, total), _unchunk(partitioner, gradient, total)


def _backward(model: Llama, gradient: jax.Array, cotangent: jax.Array) -> tuple[None, jax.Array, None]:
    return None, (cotangent[:, None] * gradient.astype(cotangent.dtype)).astype(gradient.dtype), None


_losses.defvjp(_forward, _backward)
