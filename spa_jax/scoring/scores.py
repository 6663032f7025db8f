"""The scores of a task: ROUGE for all of them, and exact match and F1 where answers are short."""

from collections.abc import Sequence
from typing import Literal

from spa_jax.scoring.answers import against_humans, exact_match, f1
from spa_jax.scoring.rouge import rouge

Kind = Literal["rouge", "answers"]


def score(kind: Kind, text: str, references: Sequence[str], tokenizer: str = "english") -> dict[str, float]:
    """Computes scores from 0 to 100: `rouge1`, `rouge2`, `rougeL`, `rougeLsum`, and for answers `exact_match` and `f1`.

    Args:
        kind: the task's kind of scores.
        text: the generated text.
        references: people's answers, at least one.
        tokenizer: what ROUGE counts.
    """
    scores = rouge(text, references, tokenizer)
    if kind == "answers":
        scores["exact_match"] = 100 * against_humans(exact_match, text, references)
        scores["f1"] = 100 * against_humans(f1, text, references)
    return scores


def repetition(text: str) -> float:
    """Computes the share, in per cent, of a text's runs of four words that occurred earlier in it: seq-rep-4 of Welleck
    et al. (2020), over words between white space; 0 where there is no run."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], words[3:]))
    return 100 * (1 - len(set(runs)) / len(runs)) if runs else 0.0
