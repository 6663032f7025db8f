"""Runs commands: flags by absl, and a `UserError` as one line on the terminal with exit status 2."""

import ast
import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

import rich
from absl import app, flags
from absl import logging as absl_logging

from spa_jax.data.text import visible
from spa_jax.errors import UserError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which spa_jax does not need
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it says in many lines what a `UserError` says in one


class ConsoleHandler(logging.Handler):
    """Prints log lines on rich's console, which keeps them apart from a progress bar drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        line = visible(self.format(record))
        rich.get_console().print(line, style=style, soft_wrap=True, highlight=False, markup=False)


_arguments: list[str] | None = None
"""The arguments that `read_flags` has left of the command line."""


def read_flags(check: Callable[[], None]) -> None:
    """Reads the flags of a command and checks them, before its slow imports; `run` then reads them no more."""
    global _arguments
    _tolerate_other_encodings()
    app.define_help_flags()
    arguments = _parse_flags(sys.argv)
    _refuse_positional(arguments)
    try:
        check()
    except UserError as error:
        _fail(str(error), error.status)
    _arguments = arguments


def run(main: Callable[..., None], positional: bool = False, resumable: bool = False) -> None:
    """Parses the flags, runs `main` and exits; progress and the log of spa_jax go to standard error.

    A `UserError` ends as the line `error: ...` and its status (2), an interruption as status 130, output that nobody
    reads on (`... | head`) as status 1. A traceback is a bug.

    Args:
        main: the command.
        positional: whether it takes the list of arguments that are no flags; else there may be none.
        resumable: whether the same command again goes on where it was interrupted.
    """

    _tolerate_other_encodings()

    def guarded(arguments: list[str]) -> None:
        if not positional:
            _refuse_positional(arguments)
        absl_logging.set_verbosity(absl_logging.WARNING)
        rich.reconfigure(stderr=True)
        log = logging.getLogger("spa_jax")
        log.setLevel(logging.INFO)
        log.addHandler(ConsoleHandler())
        log.propagate = False
        try:
            main(*([arguments[1:]] if positional else []))
            sys.stdout.flush()
        except UserError as error:
            _fail(str(error), error.status)
        except BrokenPipeError:
            if _output_is_read():  # some other connection broke
                raise
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted" + (": the same command goes on" if resumable else ""), file=sys.stderr)
            sys.exit(130)

    global _arguments
    read, _arguments = _arguments, None
    app.run(guarded, flags_parser=_parse_flags if read is None else lambda _: read)


def print_error(message: str) -> None:
    """Prints one line; of a message with several lines (a traceback) the first and the last."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print("error:", *map(visible, dict.fromkeys((lines[0], lines[-1]))), file=sys.stderr)


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


def _output_is_read() -> bool:
    """Says whether the reader of standard output is still there."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return not poll.poll(0)


def _refuse_positional(arguments: list[str]) -> None:
    if len(arguments) > 1:
        _fail(f"unexpected argument '{arguments[1]}': options are written --name=value")


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        _fail(str(error))
    except BrokenPipeError:  # of `--help | head`
        sys.exit(1)
    except OSError as error:
        _fail(explain_unread_config(error))
    except Exception as error:  # a config file is Python, and may raise anything
        text, name = str(error), type(error).__name__
        with contextlib.suppress(ValueError, SyntaxError):
            while text[:1] in ("'", '"'):  # ml_collections quotes a quoted key
                text, name = ast.literal_eval(text), "no such key"
        _fail(f"cannot use the config: {name}: {text}")


def _fail(message: str, status: int = UserError.status) -> NoReturn:
    """Prints a message as one line and exits."""
    print_error(message)
    sys.exit(status)
