"""Prompts are counted, padded, and refused by name."""

import numpy as np
import pytest

from spa_jax.decoding.prompts import check_lengths, check_tokens, longest_extensions, pad_prompts
from spa_jax.errors import UserError


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "says"),
    [
        ([[1, 2], []], 2, "a prompt is empty"),
        ([[1, 2], [1] * 7], 2, "7 tokens and 2 new ones do not fit the backbone's context of 8"),
        ([[1, 2]], 0, "max_new_tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_by_name(prompts, max_new_tokens, says):
    with pytest.raises(UserError, match=says):
        check_lengths(prompts, max_new_tokens, limit=8)


@pytest.mark.parametrize("token", [300, 305, -1, 2**32 - 1])
def test_tokens_that_have_no_row_in_the_embedding_are_refused(token):
    check_tokens([[5, 299], [0]], 300)
    with pytest.raises(UserError, match=f"tokens that this backbone has not: {token}, where its vocabulary has 300"):
        check_tokens([[5], [5, token, 7]], 300)


def test_prompts_are_counted_and_padded_to_one_length():
    prompts = [[3], [1] * 33, [5, 6]]
    assert check_lengths(prompts, 2, limit=35).tolist() == [1, 33, 2]
    tokens = pad_prompts(prompts)
    assert (tokens.shape, tokens.dtype) == ((3, 48), np.int32)
    assert [row.tolist()[: len(prompt)] for row, prompt in zip(tokens, prompts)] == prompts
    assert not any(row[len(prompt) :].any() for row, prompt in zip(tokens, prompts))


def test_prompts_begin_the_longest_that_goes_on_as_they_do():
    assert longest_extensions([[1, 2], [1, 2, 3], [1], [2], [1, 2, 4], [1, 2, 3]]).tolist() == [1, 1, 1, 3, 4, 1]
