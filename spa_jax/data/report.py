"""Describes what will be learnt of rows."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from spa_jax.data.encoding import Encoder, Example
from spa_jax.data.overlap import find_overlap
from spa_jax.data.pairs import Pair
from spa_jax.errors import UserError


def describe(train: Sequence[Pair], held_out: Sequence[Pair], encoder: Encoder, row: int = 1) -> dict[str, Any]:
    """Describes rows as they will be trained on and evaluated on, for JSON.

    Args:
        train: rows to train on.
        held_out: rows to evaluate on.
        encoder: makes tokens of them.
        row: number of the training row that is shown, from 1.

    Returns:
        `template` and `max_length` of the encoder; of `train` and `held_out` the numbers of rows, answers, answers that
        are learnt, tokens, target tokens and tokens of the longest row, and the rows whose source is cut; in `overlap`,
        the held-out rows that ask the `same` as a training row, or nearly (`near`), each with that row; and as
        `example` the text of a training row, in spans that are targets or not.

    Raises:
        UserError: a row cannot be encoded, or there is no row of that number.
    """
    if not 1 <= row <= len(train):
        raise UserError(f"there is no training row {row}, but {len(train)}, from 1")
    splits = {"train": train, "held_out": held_out}
    encoded = {name: [encoder.encode(pair) for pair in pairs] for name, pairs in splits.items()}
    overlap = find_overlap(train, held_out)
    return {
        "template": encoder.template,
        "max_length": encoder.max_length,
        **{name: _describe_split(pairs, encoded[name]) for name, pairs in splits.items()},
        "overlap": {
            kind: [[pair.origin, like.origin] for pair, like in found] for kind, found in overlap._asdict().items()
        },
        "example": {"row": train[row - 1].origin, "spans": spans(encoded["train"][row - 1][0], encoder.tokenizer)},
    }


def spans(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Returns the text of an example, special tokens included, in parts with whether they are `target`s."""
    tokens = [*example.tokens.tolist(), int(example.targets[-1])]
    is_target = np.isin(np.arange(len(tokens)), example.predict + 1).tolist()
    parts = itertools.groupby(zip(tokens, is_target), key=lambda token: token[1])
    return [{"target": target, "text": tokenizer.decode([token for token, _ in part])} for target, part in parts]


def _describe_split(pairs: Sequence[Pair], encoded: Sequence[tuple[Example, bool]]) -> dict[str, Any]:
    lengths = [len(example.tokens) for example, _ in encoded]
    return {
        "rows": len(pairs),
        "answers": sum(len(pair.turns) for pair in pairs),
        "answers_learnt": sum(len(pair.learnt_turns) for pair in pairs),
        "tokens": sum(lengths),
        "target_tokens": sum(len(example.targets) for example, _ in encoded),
        "longest": max(lengths),
        "cut": [pair.origin for pair, (_, is_cut) in zip(pairs, encoded) if is_cut],
    }
