"""Text that is text: what came from a file, a command line or a terminal, before a tokenizer or a message takes it, and
what came from anywhere, before a terminal does."""

import re

from spa_jax.errors import UserError

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of writing."""


def check_text(text: str, where: str) -> str:
    """Returns the text, which can be written as UTF-8.

    Args:
        text: where a byte could not be decoded, or a JSON escape is half of a surrogate pair, it has a lone surrogate.
        where: names the text in the message.

    Raises:
        UserError: it has a lone surrogate, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is not text: character {error.start + 1} is {text[error.start]!a}, half of a surrogate pair or a "
            "byte that could not be decoded; use UTF-8, in the terminal too"
        ) from error
    return text


def check_prompt(prompt: str) -> str:
    """Returns a prompt that a model can be asked.

    Raises:
        UserError: it is empty, or not text.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty")
    return check_text(prompt, "the prompt")


def visible(text: str) -> str:
    r"""Returns the text with escapes such as `\x1b` for all characters that a terminal would take for commands."""
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], text)
