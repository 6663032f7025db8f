"""ROUGE (Lin 2004) of a generated text against its references, by `rouge-score`."""

import functools
import re
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""Unigrams, bigrams, longest common subsequence of the whole texts, and the same by sentences. The paper says "Rouge-L"
and not which of the last two."""
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def sentences(text: str) -> str:
    """Writes each sentence of a text on a line of its own, as rougeLsum needs it.

    A sentence ends at a line break, and after a full stop, exclamation or question mark (with the quotes and brackets
    it closes) that a space follows. Abbreviations are not known, and end sentences too.
    """
    lines = (line for part in text.splitlines() for line in _split(part))
    return "\n".join(line.strip() for line in lines if line.strip())


def _split(line: str) -> list[str]:
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    return [line[begin:end] for begin, end in zip([0, *ends], [*ends, len(line)])]


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(KINDS, use_stemmer=True)


def rouge(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Computes the F1 of each of `KINDS` from 0 to 100, with Porter stemming; of several references the best for each.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("a prediction is scored against at least one reference")
    predicted = sentences(prediction)
    scores = [_scorer().score(sentences(reference), predicted) for reference in references]
    return {kind: 100 * max(score[kind].fmeasure for score in scores) for kind in KINDS}
