"""Prints a generation as it comes, with the device's tokens in a style of their own."""

import sys

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from spa_jax.data.text import visible

DEVICE_STYLE = "bold magenta"
KEEP_PLACE, GO_BACK, CLEAR_LINE = "\x1b7", "\x1b8", "\x1b[K"


class Printer:
    """Colours the text of tokens for which the device was asked, or puts it in [brackets] if output is no terminal.

    What a terminal would take for commands is shown as escapes.
    """

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bracket = False
        self._line = ""  # what stands in the terminal's line
        self._is_waiting = self._has_printed = False

    @property
    def style_description(self) -> str:
        """How the device's tokens look: `coloured` or `in brackets`."""
        return "coloured" if self._console.is_terminal else "in brackets"

    def add(self, text: str, consulted: bool) -> None:
        """Prints the text of one token, which may be empty."""
        if not text:
            return
        text = visible(text)
        self._has_printed = True
        if self._console.is_terminal:
            self._end_wait()
            self._console.print(Text(text, style=DEVICE_STYLE if consulted else ""), end="")
            self._line = (self._line + text).rpartition("\n")[2]
            return
        if consulted != self._bracket:
            space = text[: len(text) - len(text.lstrip())]
            self._write(f"{space}[" if consulted else "]")
            text = text[len(space) :] if consulted else text
            self._bracket = consulted
        self._write(text)

    def wait(self, what: str) -> None:
        """Says on a terminal what is waited for, behind what is printed, until more is; where the line has room."""
        width = self._console.width
        room = width - cell_len(self._line) % width - 2
        if not self._console.is_terminal or self._console.is_dumb_terminal or room < len(what):
            return
        self._is_waiting = True
        self._write(f"{KEEP_PLACE} \x1b[2m{visible(what)}\x1b[0m{CLEAR_LINE}{GO_BACK}")

    def finish(self) -> None:
        """Ends the line, if one was begun."""
        self._end_wait()
        if self._has_printed:
            self._write("]\n" if self._bracket else "\n")
        self._bracket, self._line, self._has_printed = False, "", False

    def _end_wait(self) -> None:
        if self._is_waiting:
            self._write(CLEAR_LINE)
        self._is_waiting = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
