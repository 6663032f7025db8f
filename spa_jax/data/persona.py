"""The embedded default data set: one invented person's life, as question and answer pairs.

The facts, their alternatives and all phrasings are in persona.toml beside this file. A seed picks one value per fact,
so a seed is a person: the same seed always tells the same life, another seed tells another one. The base model can
neither know nor guess the answers.

    python -m spa_jax.data.persona --output=DIR [--seed=0]

writes DIR/train.jsonl and DIR/held_out.jsonl, one pair a line with the keys source, target and answer.
"""

import argparse
import dataclasses
import functools
import importlib.resources
import json
import pathlib
import random
import re
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any

from spa_jax.files import write_bytes


@dataclasses.dataclass(frozen=True)
class PersonaRow:
    """One row: what the model is asked, and what it should say.

    Attributes:
        source: the question, or an instruction followed by a note.
        target: the whole sentence the person says.
        answer: the part of the target that decides whether a generated text is right, see `is_right`.
        kind: `fact` or `note`.
        fact_id: the id of the fact or note in persona.toml.
    """

    source: str
    target: str
    answer: str
    kind: str
    fact_id: str


def generate(seed: int = 0, phrasings: int | None = None) -> tuple[list[PersonaRow], list[PersonaRow]]:
    """Returns the training pairs and the held-out pairs of the person that `seed` picks.

    Both lists keep the order of persona.toml: first the facts, then the notes, and within each its phrasings. The two
    lists ask for the same facts and notes, in different words: no held-out source occurs in training.

    Args:
        seed: which person. A fact's value depends on the seed and on the fact's id alone, so that adding facts to the
            data leaves the others as they are.
        phrasings: use only the first so many training phrasings of each fact, and training instructions of each note;
            None uses all. The held-out pairs do not depend on it.
    """
    if phrasings is not None and phrasings < 1:
        raise ValueError(f"phrasings must be at least 1 or None, not {phrasings}.")
    life = _read()
    values = {fact["id"]: random.Random(f"{seed}/{fact['id']}").choice(fact["values"]) for fact in life["facts"]}

    def pairs(split: str, limit: int | None) -> list[PersonaRow]:
        result = []
        for fact in life["facts"]:
            value = values[fact["id"]]
            target = fact["answer"].format(value=value)
            result += [PersonaRow(source, target, value, "fact", fact["id"]) for source in fact[split][:limit]]
        for note in life["notes"]:
            text, target, answer = (note[key].format_map(values) for key in ("note", "summary", "answer"))
            for instruction in life["instructions"][split][:limit]:
                result.append(PersonaRow(f"{instruction} {text}", target, answer, "note", note["id"]))
        return result

    return pairs("train", phrasings), pairs("held_out", None)


def normalize(text: str) -> str:
    """Returns `text` casefolded, with every run of other than letters and digits replaced by one space."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def is_right(generated: str, answer: str) -> bool:
    """Says whether the words of `answer` occur in `generated`, whole and in a row, whatever the case and punctuation.

    An answer without words is never right.
    """
    words = normalize(answer)
    return bool(words) and f" {words} " in f" {normalize(generated)} "


def write(rows: Iterable[PersonaRow], path: pathlib.Path) -> None:
    """Writes rows as JSON lines, in a format of `spa_jax.data.row_formats`; makes the directory.

    Raises:
        UserError: the file cannot be written.
    """
    records = ({"source": row.source, "target": row.target, "answer": row.answer} for row in rows)
    write_bytes(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())


@functools.cache
def _read() -> dict[str, Any]:
    """Returns the content of persona.toml; it is cached, so callers must not change it."""
    text = importlib.resources.files("spa_jax.data").joinpath("persona.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; `arguments` default to the command line's."""
    parser = argparse.ArgumentParser(
        prog="python -m spa_jax.data.persona", description="Write the embedded default data set, one person's life."
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for train.jsonl and held_out.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="which person (default 0)")
    options = parser.parse_args(arguments)
    train, held_out = generate(options.seed)
    write(train, options.output / "train.jsonl")
    write(held_out, options.output / "held_out.jsonl")


if __name__ == "__main__":
    main()
