"""A page to look at: every answer of an evaluation, its tokens coloured by their source, beside the reference."""

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from spa_jax.files import write_bytes
from spa_jax.scoring.predictions import Prediction

TEMPLATE = "report.html.jinja"


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question and its answer.

    Attributes:
        source: what was asked.
        references: the answers that it is scored against.
        prediction: the answer.
        is_cut: whether it has the most tokens that an answer may have.
    """

    source: str
    references: Sequence[str]
    prediction: Prediction
    is_cut: bool = False


def write_report(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    summary: Mapping[str, Any],
    answers: Sequence[Answered],
    warnings: Sequence[str] = (),
) -> None:
    """Writes one HTML file that needs no other.

    Args:
        path: the file.
        title: of the page.
        facts: what was evaluated, by name.
        summary: what evaluation.json says: a number for each metric, or `[mean, low, high]`.
        answers: in the order of the page.
        warnings: what a reader of the metrics has to know.

    Raises:
        UserError: the file cannot be written.
    """
    text = importlib.resources.files("spa_jax.scoring").joinpath(TEMPLATE).read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    metrics = {name: value for name, value in summary.items() if isinstance(value, int | float | list)}
    page = template.render(title=title, facts=facts, metrics=metrics, answers=answers, warnings=warnings)
    write_bytes(path, page.encode(errors="backslashreplace"))  # the title may be a file's name, which may be no text
