"""The formats that people's rows have: a file's is recognised by its columns, and each row becomes a `Pair`."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spa_jax.data.pairs import Pair, Role, Turn, exchanges
from spa_jax.data.row_files import parse_json, read_rows
from spa_jax.data.text import check_text
from spa_jax.errors import UserError
from spa_jax.files import write_bytes

Row = Mapping[str, Any]

log = logging.getLogger(__name__)


class NothingToLearn(UserError):
    """A row without a question or without an answer."""


def read_pairs(path: str, columns: str = "") -> list[Pair]:
    """Reads the rows of a file in any of `FORMATS`.

    Args:
        path: of the file, see `spa_jax.data.row_files.read_rows`.
        columns: our names of columns and the file's, such as `source=question,target=answer`, of which only these are
            read; empty where the file has ours.

    Raises:
        UserError: the file cannot be read or has no rows, its columns are those of no format or of several, or a row
            is not of the format or has nothing to learn.
    """
    pairs, _ = to_pairs(read_rows(path), f"the data file '{path}'", columns)
    return pairs


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes pairs as JSON lines of `messages`, from which `read_pairs` makes the same pairs, but for the phrase that a
    generation of the embedded data set contains, and other people's answers."""
    rows = ({"messages": [message for turn in pair.turns for message in _as_messages(turn)]} for pair in pairs)
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def add_conversation(path: Path, turns: Iterable[Turn]) -> None:
    """Adds a row of `messages` to a file of JSON lines, which need not exist yet.

    Raises:
        UserError: there is no answer in it, or the file cannot be read or written.
    """
    messages = [turn._asdict() for turn in turns]
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("there is no answer yet that could be saved")
    try:
        before = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
    begin = before + (b"" if before.endswith(b"\n") or not before else b"\n")
    write_bytes(path, begin + json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")


def _as_messages(pair: Pair) -> list[dict[str, Any]]:
    asked = [*pair.context, Turn("user", pair.source)]
    weight = {} if pair.learnt else {"weight": 0}
    return [*(turn._asdict() for turn in asked), {"role": "assistant", "content": pair.target, **weight}]


def to_pairs(
    rows: Iterable[tuple[str, Row]], where: str, columns: str = "", skip: bool = False
) -> tuple[list[Pair], list[str]]:
    """Converts rows to pairs, by the format that the first row's columns are of.

    Args:
        rows: each after what names it.
        where: names all of them.
        columns: see `read_pairs`.
        skip: whether rows that have nothing to learn are left out, and not refused.

    Returns:
        The pairs, and what is said of the rows that are left out.

    Raises:
        UserError: see `read_pairs`.
    """
    names, form, pairs, skipped = parse_columns(columns), "", list[Pair](), list[str]()
    for origin, row in rows:
        if names:
            row = _renamed(row, names, origin)
        form = form or recognise(row, origin)
        try:
            pairs.append(FORMATS[form].convert(row, origin))
        except NothingToLearn as error:
            if not skip:
                raise
            skipped.append(str(error))
    if not pairs:
        raise UserError(f"{where} has no rows" + (f" with something to learn: {skipped[0]}" if skipped else ""))
    log.info("%s has %d rows of %s", where, len(pairs), form)
    return pairs, skipped


def parse_columns(text: str) -> dict[str, str]:
    """Reads names of columns such as `source=question,target=answer`: ours -> the data's.

    Raises:
        UserError: the text is not of this form, or a name before a sign of equality is none of ours.
    """
    ours = {name for form in FORMATS.values() for name in (*form.columns, *form.optional)}
    parts = [part.partition("=") for part in text.split(",")] if text else []
    names = {name.strip(): other.strip() for name, _, other in parts}
    if len(names) < len(parts) or not ours >= names.keys() or not all(names.values()):
        raise UserError(
            f"data.columns is '{text}': write our names of columns and yours, such as source=question,target=answer; "
            f"ours are {', '.join(sorted(ours))}"
        )
    return names


def recognise(row: Row, where: str) -> str:
    """Returns the name of the format that has the columns of a row.

    Raises:
        UserError: none has, or several have.
    """
    found = [name for name, form in FORMATS.items() if row.keys() >= set(form.columns)]
    if len(found) == 1:
        return found[0]
    known = f"{where}: the columns {', '.join(sorted(row)) or 'of no name'}"
    if found:
        example = ",".join(f"{name}={name}" for name in FORMATS[found[0]].columns)
        raise UserError(f"{known} can be read as {' or as '.join(found)}: say which, such as by data.columns={example}")
    raise UserError(
        f"{known} are of no format that can be read ({'; '.join(FORMATS)}): rename them, or say which is the question "
        "and which the answer by data.columns=source=...,target=... (of check and evaluate: --columns=...)"
    )


def _renamed(row: Row, names: Mapping[str, str], where: str) -> Row:
    missing = [name for name in names.values() if name not in row]
    if missing:
        raise UserError(
            f"{where}: column '{missing[0]}', which data.columns names, is missing; columns are {sorted(row)}"
        )
    return {ours: row[name] for ours, name in names.items()}


def _text(row: Row, column: str, where: str) -> str:
    """Returns a column's text, which is not blank."""
    value = row.get(column)
    blank = value is None or (type(value) is str and not value.strip())
    if blank or type(value) is not str:
        problem = NothingToLearn if blank else UserError
        raise problem(f"{where}: column '{column}' is missing, empty or not text; columns are {sorted(row)}")
    return check_text(value, f"{where}: column '{column}'")


def _optional_text(row: Row, column: str, where: str) -> str | None:
    value = row.get(column)
    if value is not None and type(value) is not str:
        raise UserError(f"{where}: column '{column}' is not text")
    return None if value is None else check_text(value, f"{where}: column '{column}'")


def _system(row: Row, where: str) -> tuple[Turn, ...]:
    text = _optional_text(row, "system", where)
    return (Turn("system", text),) if text and text.strip() else ()


def _source_and_target(row: Row, where: str) -> Pair:
    return Pair(_text(row, "source", where), _text(row, "target", where), _optional_text(row, "answer", where), where)


def _instruction_and_output(row: Row, where: str) -> Pair:
    instruction, text = _text(row, "instruction", where), _optional_text(row, "input", where)
    source = f"{instruction}\n\n{text}" if text and text.strip() else instruction
    return Pair(source, _text(row, "output", where), origin=where, context=_system(row, where))


def _prompt_and_completion(row: Row, where: str) -> Pair:
    """Converts texts, or lists of turns, of which those of the completion are learnt."""
    if not isinstance(row.get("prompt"), list):
        return Pair(_text(row, "prompt", where), _text(row, "completion", where), origin=where)
    prompt = [(turn, False) for turn, _ in _turns(row, "prompt", where)]
    return _conversation([*prompt, *_turns(row, "completion", where)], where)


def _messages(column: str) -> Callable[[Row, str], Pair]:
    def convert(row: Row, where: str) -> Pair:
        return _conversation([*((turn, False) for turn in _system(row, where)), *_turns(row, column, where)], where)

    return convert


ROLES: Mapping[Any, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
"""Names of roles in the chat formats, and what they mean."""


def _turns(row: Row, column: str, where: str) -> list[tuple[Turn, bool]]:
    """Reads a list of turns, each with whether it is to be learnt if it is an answer.

    A turn has `role` and `content` or, as ShareGPT calls them, `from` and `value`; where a file can have text alone,
    as CSV can, the list is written as JSON.
    """
    value = row.get(column)
    if type(value) is str:
        try:
            value = parse_json(value)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: column '{column}' is neither a list of turns nor JSON of one: {error}"
            ) from error
    if isinstance(value, Mapping) and all(isinstance(part, list) for part in value.values()):
        # `datasets` keeps what it calls a Sequence of mappings as a mapping of lists.
        value = [dict(zip(value, turn)) for turn in zip(*value.values())]
    if not value:
        raise NothingToLearn(f"{where}: column '{column}' is missing or empty; columns are {sorted(row)}")
    if not isinstance(value, list):
        raise UserError(f"{where}: column '{column}' is no list of turns")
    turns = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, start=1)]
    return [turn for turn in turns if turn is not None]


def _turn(turn: Any, where: str) -> tuple[Turn, bool] | None:
    """Reads one turn; None for a system turn that is blank."""
    if not isinstance(turn, Mapping):
        raise UserError(f'{where} is no turn, such as {{"role": "user", "content": "text"}}')
    name, content, weight = turn.get("role") or turn.get("from"), turn.get("content"), turn.get("weight")
    content = turn.get("value") if content is None else content
    if not isinstance(name, str) or name not in ROLES:
        raise UserError(f"{where} has the role {name!r}, and those that can be read are {', '.join(ROLES)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise UserError(f"{where} calls a tool, which cannot be learnt: leave such conversations out")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if type(part) is str]
        content = "".join(texts) if len(texts) == len(parts) else parts
    if content is not None and type(content) is not str:
        raise UserError(f"{where} has content that is not text; keys are {sorted(turn)}")
    if str(weight) not in _WEIGHTS:
        raise UserError(f"{where} has the weight {weight!r}: write 0 for an answer that is not to be learnt, or 1")
    if not content or not content.strip():
        if ROLES[name] == "system":
            return None
        raise NothingToLearn(f"{where} is empty; keys are {sorted(turn)}")
    return Turn(ROLES[name], check_text(content, where)), _WEIGHTS[str(weight)]


_WEIGHTS = {"None": True, "1": True, "1.0": True, "True": True, "0": False, "0.0": False, "False": False}


def _conversation(turns: Iterable[tuple[Turn, bool]], where: str) -> Pair:
    """Pairs every answer with the user's turn that it follows; what else is said before that turn is its context.

    What comes after the last answer that is learnt is nothing that could be learnt from, and left out.
    """
    pairs = [
        Pair(
            source.content,
            answer.content,
            origin=f"{where}, answer {number}" if number > 1 else where,
            context=tuple(context),
            learnt=learnt,
        )
        for number, ((*context, source), answer, learnt) in enumerate(exchanges(turns, where)[0], start=1)
    ]
    while pairs and not pairs[-1].learnt:
        pairs.pop()
    if not pairs:
        raise NothingToLearn(f"{where} has no answer to a user's turn that is to be learnt")
    return dataclasses.replace(pairs[0], later=tuple(pairs[1:]))


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    Attributes:
        columns: those by which it is recognised.
        optional: columns that are read if they exist.
        convert: makes a row a pair, given what names the row; raises a `UserError` if it is not of the format.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row, str], Pair]


FORMATS = {
    "source and target": RowFormat(("source", "target"), ("answer",), _source_and_target),
    "messages": RowFormat(("messages",), ("system",), _messages("messages")),
    "conversations": RowFormat(("conversations",), ("system",), _messages("conversations")),
    "instruction and output": RowFormat(("instruction", "output"), ("input", "system"), _instruction_and_output),
    "prompt and completion": RowFormat(("prompt", "completion"), (), _prompt_and_completion),
}
"""Formats by what they are called in messages."""
