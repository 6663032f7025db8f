"""The choice of the next token, from what enters the LM head: shared by the fused and the split programs.

Shape letters: G groups (prompts), K hypotheses of each, R = G K rows, V vocabulary, D width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.decoding.beam import Beams, search_step
from spa_jax.decoding.hypotheses import Hypotheses
from spa_jax.decoding.sampling import Sampling, sample_step
from spa_jax.models.llama import Llama, Params


def choose_next_token(
    model: Llama,
    frozen: Params,
    head_input: Float[Array, "B D"],
    consulted: Bool[Array, " B"],
    hypotheses: Hypotheses,
    active: Bool[Array, " G"],
    sampling: Sampling,
    beams: Beams | None,
    eos_ids: tuple[int, ...],
) -> tuple[Hypotheses, Int[Array, "G K"]]:
    """Applies the LM head, and adds one token to the active groups by beam search or else by sampling.

    B is R, or G just after the prompt, when all hypotheses of a group have the same state. `frozen` are the parameters
    of the model, and the rest is as for `search_step` and `sample_step`.

    Returns:
        The new hypotheses, and for each the index within its group of the one it continues.
    """
    logits = model.apply({"params": frozen}, head_input, method="logits")
    shape = hypotheses.scores.shape
    logits = jnp.broadcast_to(logits.reshape(shape[0], -1, logits.shape[-1]), (*shape, logits.shape[-1]))
    consulted = jnp.broadcast_to(consulted.reshape(shape[0], -1), shape)
    if beams is not None:
        return search_step(beams, hypotheses, logits, consulted, active, eos_ids)
    return sample_step(sampling, hypotheses, logits, consulted, active, eos_ids)
