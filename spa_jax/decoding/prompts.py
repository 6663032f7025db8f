"""Prompts as lists of token ids: checked, padded, and those found that are the beginning of others.

Shape letters: G prompts, T tokens.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from spa_jax.data.padding import padded_length
from spa_jax.errors import UserError


def check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int) -> Int[np.ndarray, " G"]:
    """Counts the tokens of each prompt, int32.

    Raises:
        UserError: a prompt is empty, or does not fit into `limit` positions together with `max_new_tokens` new tokens.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    if not lengths.all():
        raise UserError("a prompt is empty: it needs at least one token")
    if max_new_tokens < 1 or longest + max_new_tokens > limit:
        raise UserError(
            f"the prompt of {longest} tokens and {max_new_tokens} new ones do not fit the backbone's context of "
            f"{limit}: shorten the prompt or change max_new_tokens"
        )
    return lengths


def check_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses token ids that are not those of a vocabulary.

    Raises:
        UserError: an id is negative, or `vocab_size` or above.
    """
    for prompt in prompts:
        if wrong := [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]:
            raise UserError(
                f"the prompt holds tokens that this backbone has not: {wrong[-1]}, where its vocabulary has "
                f"{vocab_size} (0 to {vocab_size - 1}); encode the prompt by the backbone's own tokenizer"
            )


def pad_prompts(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "G T"]:
    """Pads prompts with zeros on the right to a common length, one of few; int32."""
    tokens = np.zeros((len(prompts), padded_length(max(map(len, prompts)), 32)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens


def longest_extensions(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, " G"]:
    """Finds for each prompt the longest one that begins with it, by index, int32; mostly that is itself."""
    extensions = np.arange(len(prompts), dtype=np.int32)
    unextended: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        found = next((k for k in unextended if list(prompts[k][: len(prompts[i])]) == list(prompts[i])), None)
        extensions[i] = i if found is None else found
        unextended += [i] if found is None else []
    return extensions
