"""ROUGE (Lin 2004) of a generated text against its references, by `rouge-score`."""

import functools
import re
import unicodedata
from collections.abc import Sequence

import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""Unigrams, bigrams, longest common subsequence of the whole texts, and the same by sentences. The paper says "Rouge-L"
and not which of the last two."""
WORD_BOUNDARY = regex.compile(r"(?V1w)\b")
SENTENCE_END = re.compile(
    r"(?<=[.!?\u061f\u0964])[\"')\]]*\s+|(?<=[\u3002\uff01\uff1f])[\u300d\u300f\u201d\u2019\uff09]*"
)


def sentences(text: str) -> str:
    """Writes each sentence of a text on a line of its own, as rougeLsum needs it.

    A sentence ends at a line break, and after a full stop, exclamation or question mark (with the quotes and brackets
    it closes) that a space follows, or that is Chinese or Japanese. Abbreviations are not known, and end sentences too.
    """
    lines = (line for part in text.splitlines() for line in _split(part))
    return "\n".join(line.strip() for line in lines if line.strip())


def _split(line: str) -> list[str]:
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    return [line[begin:end] for begin, end in zip([0, *ends], [*ends, len(line)])]


class UnicodeTokenizer(Tokenizer):
    """Splits a text at Unicode's word boundaries (UAX 29), and keeps what has a letter or a digit, in one case."""

    def tokenize(self, text: str) -> list[str]:
        parts = WORD_BOUNDARY.split(unicodedata.normalize("NFKC", text).casefold())
        return [part for part in parts if any(map(str.isalnum, part))]


TOKENIZERS: dict[str, Tokenizer] = {"english": DefaultTokenizer(use_stemmer=True), "unicode": UnicodeTokenizer()}
"""Tokenizers of ROUGE by name: `english` counts the stems (Porter) of words of a to z and digits, and is the one of
`rouge-score`; `unicode` counts the words of any script without stemming, and where a script has no spaces (Chinese,
Japanese, Thai) its characters."""


@functools.cache
def _scorer(tokenizer: str) -> RougeScorer:
    return RougeScorer(KINDS, tokenizer=TOKENIZERS[tokenizer])


def is_scoreable(reference: str, tokenizer: str = "english") -> bool:
    """Says whether the reference has a token; against one without, ROUGE is 0 whatever the prediction."""
    return bool(TOKENIZERS[tokenizer].tokenize(reference))


def rouge(prediction: str, references: Sequence[str], tokenizer: str = "english") -> dict[str, float]:
    """Computes the F1 of each of `KINDS` from 0 to 100; of several references the best for each.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("a prediction is scored against at least one reference")
    predicted = sentences(prediction)
    scores = [_scorer(tokenizer).score(sentences(reference), predicted) for reference in references]
    return {kind: 100 * max(score[kind].fmeasure for score in scores) for kind in KINDS}
