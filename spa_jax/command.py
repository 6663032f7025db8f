"""Runs commands: flags by absl, and a `UserError` as one line on the terminal with exit status 2."""

import ast
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import rich
from absl import app, flags
from absl import logging as absl_logging

from spa_jax.data.text import check_prompt
from spa_jax.errors import UserError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which spa_jax does not need
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it says in many lines what a `UserError` says in one


class ConsoleHandler(logging.Handler):
    """Prints log lines on rich's console, which keeps them apart from a progress bar drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        rich.get_console().print(self.format(record), style=style, soft_wrap=True, highlight=False, markup=False)


def run(main: Callable[..., None], positional: bool = False) -> None:
    """Parses the flags, runs `main` and exits; progress and the log of spa_jax go to standard error.

    A `UserError` ends as the line `error: ...` and its status (2), an interruption as status 130. A traceback is a bug.

    Args:
        main: the command.
        positional: whether it takes the list of arguments that are no flags; else there may be none.
    """

    _tolerate_other_encodings()

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1 and not positional:
            _fail(f"unexpected argument '{arguments[1]}': options are written --name=value")
        absl_logging.set_verbosity(absl_logging.WARNING)
        rich.reconfigure(stderr=True)
        log = logging.getLogger("spa_jax")
        log.setLevel(logging.INFO)
        log.addHandler(ConsoleHandler())
        log.propagate = False
        try:
            main(*([arguments[1:]] if positional else []))
        except UserError as error:
            _fail(str(error), error.status)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse_flags)


def typed_prompts() -> Iterator[str]:
    """Yields the lines that are typed in until the end of the input, without empty ones and those that are not text, of
    which it says so."""
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if not prompt:
            continue
        try:
            yield check_prompt(prompt)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def explain_unread_config(error: OSError) -> str:
    """Says why there is no config, of what ml_collections raises at the first use of one that it could not read."""
    reason = str(error.__cause__ or error).splitlines()[-1].strip()
    return (
        f"cannot read the config: {reason}; the files in configs/ are found from the project's checkout alone: run "
        "there, or give the file's whole path"
    )


def _tolerate_other_encodings() -> None:
    """Lets standard output write characters that its encoding does not have as escapes, as standard error does, and
    standard input read bytes that its encoding does not have as lone surrogates, which `check_text` refuses."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=errors)


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        _fail(str(error))
    except OSError as error:
        _fail(explain_unread_config(error))
    except Exception as error:  # a config file is Python, and may raise anything
        text, name = str(error), type(error).__name__
        with contextlib.suppress(ValueError, SyntaxError):
            while text[:1] in ("'", '"'):  # ml_collections quotes a quoted key
                text, name = ast.literal_eval(text), "no such key"
        _fail(f"cannot use the config: {name}: {text}")


def _fail(message: str, status: int = UserError.status) -> NoReturn:
    """Prints one line and exits; of a message with several lines (a traceback) the first and the last."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print("error:", *dict.fromkeys((lines[0], lines[-1])), file=sys.stderr)
    sys.exit(status)
