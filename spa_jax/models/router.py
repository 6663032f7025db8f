"""The router sigma: a linear D x 2 on the normalised state at the entry decides per token who is asked (equation 2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CONSULT = 1
"""Index of "ask the device" among the router's two outputs; 0 is "the cloud alone"."""


class Router(nn.Module):
    """Logits of (cloud alone, ask the device), float32; it starts at zero, which is p(consult) = 0.5, or at random."""

    random: bool = False

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... 2"]:
        initializer = nn.initializers.lecun_normal() if self.random else nn.initializers.zeros
        kernel = self.param("kernel", initializer, (hidden.shape[-1], 2))
        return jnp.einsum("...d,dr->...r", hidden.astype(jnp.float32), kernel)


def consult_probability(router_logits: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """p(consult), the softmax's share of `CONSULT`."""
    return jax.nn.softmax(router_logits, axis=-1)[..., CONSULT]


def consult(router_logits: Float[Array, "... 2"], threshold: float | jax.Array = 0.5) -> Bool[Array, "..."]:
    """sigma: true where p(consult) > threshold; 0.5 is the paper's argmax."""
    return consult_probability(router_logits) > threshold
