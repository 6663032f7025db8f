"""Exact match and F1 of short answers, as the scorer of CoQA (Reddy et al. 2019) and SQuAD counts them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Returns the words that count: lower case, without punctuation and without the articles a, an, the."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1 where the words are the same, else 0."""
    return float(words(prediction) == words(reference))


def f1(prediction: str, reference: str) -> float:
    """Computes the harmonic mean of precision and recall of the words, with their multiplicity; where either side has
    no words, it is 1 if both have none, else 0."""
    said, wanted = words(prediction), words(reference)
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def against_humans(score: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """Returns the best score over the references; of several, the mean of the best scores with each of them left out,
    so that a model is scored as a person is, whose answer can only be compared with the others'.

    Raises:
        ValueError: there is no reference.
    """
    scores = [score(prediction, reference) for reference in references]
    if not scores:
        raise ValueError("an answer is scored against at least one reference")
    if len(scores) == 1:
        return scores[0]
    return sum(max(scores[:left] + scores[left + 1 :]) for left in range(len(scores))) / len(scores)
