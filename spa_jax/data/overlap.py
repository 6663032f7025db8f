"""Finds held-out rows that are also trained on, or nearly: what is measured on them is what was learnt by heart."""

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import regex

from spa_jax.data.pairs import Pair

SHINGLE = 5
"""Characters of a shingle; texts are compared by the set of theirs."""
SIMILAR = (4, 5)
"""Two texts are nearly the same if of the shingles that either has, 4 in 5 are in both (Jaccard's index)."""

log = logging.getLogger(__name__)


class Overlap(NamedTuple):
    """Held-out rows, each with the training row that asks the same, or nearly the same."""

    same: list[tuple[Pair, Pair]]
    near: list[tuple[Pair, Pair]]


def find_overlap(train: Sequence[Pair], held_out: Sequence[Pair]) -> Overlap:
    """Compares the sources of rows, all those of a conversation together.

    They are the same whatever the case and white space, and nearly the same whatever the punctuation.
    """
    asked: dict[str, Pair] = {}
    for pair in train:
        asked.setdefault(_question(pair), pair)
    same = [(pair, asked[_question(pair)]) for pair in held_out if _question(pair) in asked]
    others = [pair for pair in held_out if _question(pair) not in asked]
    nearest = _near_duplicates(list(asked), [_question(pair) for pair in others])
    return Overlap(same, [(others[row], asked[text]) for row, text in sorted(nearest.items())])


def warn_of_overlap(train: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    """Says in the log how many held-out rows ask what a training row asks."""
    same, near = find_overlap(train, held_out)
    if same or near:
        held, trained = (same or near)[0]
        kinds = [f"{len(found)} ask {what}" for found, what in ((same, "the same"), (near, "nearly the same")) if found]
        log.warning(
            "of %d held-out rows, %s as a training row (%s is like %s): their loss says little of other questions",
            len(held_out), " and ".join(kinds), held.origin, trained.origin,
        )  # fmt: skip


def _question(pair: Pair) -> str:
    return " ".join(" ".join(turn.source for turn in pair.turns).casefold().split())


def _near_duplicates(texts: Sequence[str], searched: Sequence[str]) -> dict[int, str]:
    """Finds for each of some texts, by its index, another that is nearly the same, if there is one.

    Two sets of which so much is shared have a tenth of the smaller in common among the members that are first in any
    one order: all but the four fifths that must be shared, and a tenth (prefix filtering: Bayardo, Ma and Srikant,
    2007; Wang, Li and Feng, 2012). In the order of how rare members are, few other sets have.
    """
    shingled = [_shingles(text) for text in searched]
    frequency = Counter(shingle for shingles in shingled for shingle in shingles)
    part, whole = SIMILAR

    def rarest(shingles: Collection[str]) -> list[str]:
        shared, tenth = (-(-len(shingles) * part // whole), -(-len(shingles) // 10))
        return sorted(shingles, key=lambda one: (frequency[one], one))[: len(shingles) - shared + tenth]

    rows_of = defaultdict(list)
    for row, shingles in enumerate(shingled):
        for shingle in rarest(shingles):
            rows_of[shingle].append(row)
    found: dict[int, str] = {}
    for text in texts:
        shingles = _shingles(text)
        in_common = Counter(row for shingle in rarest(shingles) for row in rows_of.get(shingle, ()))
        for row, count in in_common.items():
            if row not in found and 10 * count >= min(len(shingles), len(shingled[row])):
                both = len(shingles & shingled[row])
                if both * whole >= part * (len(shingles) + len(shingled[row]) - both):
                    found[row] = text
    return found


def _shingles(text: str) -> set[str]:
    text = regex.sub(r"[\p{P}\s]+", " ", text).strip()
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
