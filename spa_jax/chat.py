"""Chat templates: how they write turns, and the token that they end an answer with.

A template is a program that came with a checkpoint, and may raise anything.
"""

import contextlib
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spa_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATE = "2024-07-26"
"""The day that a template is told by default: the one that LLaMA 3's templates write where there is no clock."""

_ANSWER = "an answer"
_DATE_CALL = re.compile(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")
_OTHER_USE = re.compile(r"strftime_now(?!\s+is\b)")


def render(
    tokenizer: "PreTrainedTokenizerFast", turns: Sequence[Mapping[str, str]], open_answer: bool, date: str = DATE
) -> str:
    """Writes turns of `role` and `content` as the tokenizer's chat template does.

    Args:
        tokenizer: has the template.
        turns: the conversation.
        open_answer: whether the beginning of an answer follows.
        date: the day that a template with a date writes, such as `2024-07-26`.

    Raises:
        UserError: the template fails, or the date is none.
    """
    day = datetime.datetime.combine(parse_date(date), datetime.time())
    try:
        # Templates get the time by a function, and transformers lets nobody else give them one.
        template = _DATE_CALL.sub(lambda call: repr(day.strftime(call[2])), tokenizer.get_chat_template())
        if _OTHER_USE.search(template):
            raise ValueError("it asks for the time in a format that is not a constant")
        return tokenizer.apply_chat_template(
            list(turns),
            chat_template=template,
            add_generation_prompt=open_answer,
            tokenize=False,
            date_string=day.strftime("%d %b %Y"),
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"this backbone's chat template cannot be used ({reason}): set data.template=plain") from error


def parse_date(text: str) -> datetime.date:
    """Reads a date such as `2024-07-26`.

    Raises:
        UserError: the text is none.
    """
    with contextlib.suppress(ValueError):
        day = datetime.date.fromisoformat(text)
        if day.isoformat() == text:  # there are other forms, of which two would be one day
            return day
    raise UserError(f"data.date is '{text}': write a date such as {DATE}")


def writes_date(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Tells whether the chat template may write the date."""
    return any(name in str(tokenizer.chat_template) for name in ("strftime_now", "date_string"))


def end_of_answer(tokenizer: "PreTrainedTokenizerFast", template: str) -> int | None:
    """Returns the id of the token that ends an answer after a prompt of a template, `chat` or `plain`.

    In a chat it is the special token that the template writes after an answer, where it writes one, and else EOS; None
    if the tokenizer has no EOS.

    Raises:
        UserError: the chat template fails.
    """
    if template == "chat":
        exchange = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
        _, found, after = render(tokenizer, exchange, open_answer=False).rpartition(_ANSWER)
        special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = [text for text in special if found and after.lstrip().startswith(text)]
        if ends:
            return special[max(ends, key=len)]
    return tokenizer.eos_token_id
