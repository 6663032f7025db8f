"""What bounds a row's length, and what is said of it."""

import pytest

from spa_jax.data.pairs import Pair
from spa_jax.errors import UserError
from spa_jax.training.rows import task_encoder
from spa_jax.weights.huggingface import load_directory

CONTEXT = "the backbone's context of 128 tokens; only the first source is ever cut: shorten the rest"


@pytest.mark.parametrize(
    ("max_length", "limit", "says"),
    [
        (4000, 128, CONTEXT),
        (0, 128, CONTEXT),
        (128, 128, CONTEXT),
        (127, 127, "max_length=127; only the first source is ever cut: shorten the rest or raise max_length"),
    ],
)
def test_a_row_is_bounded_by_the_backbones_context_which_no_key_raises(
    max_length, limit, says, tiny_backbone_directory
):
    encoder = task_encoder(load_directory(tiny_backbone_directory), "plain", "", max_length, limited_by="max_length")
    assert encoder.max_length == limit
    with pytest.raises(UserError, match=f"more than {says}$"):
        encoder.encode(Pair("a", "b" * 200))
    (example,), cut = encoder.encode_all([Pair("a" * 200, "b")])
    assert cut == 1
    assert len(example.tokens) == limit
