"""Prints a generation as it comes, with the device's tokens in a style of their own."""

import sys

from rich.console import Console
from rich.text import Text

DEVICE_STYLE = "bold magenta"


class Printer:
    """Colours the text of tokens for which the device was asked, or puts it in [brackets] if output is no terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bracket = False

    @property
    def style_description(self) -> str:
        """How the device's tokens look: `coloured` or `in brackets`."""
        return "coloured" if self._console.is_terminal else "in brackets"

    def add(self, text: str, consulted: bool) -> None:
        """Prints the text of one token, which may be empty."""
        if not text:
            return
        if self._console.is_terminal:
            self._console.print(Text(text, style=DEVICE_STYLE if consulted else ""), end="")
            return
        if consulted != self._bracket:
            space = text[: len(text) - len(text.lstrip())]
            self._write(f"{space}[" if consulted else "]")
            text = text[len(space) :] if consulted else text
            self._bracket = consulted
        self._write(text)

    def finish(self) -> None:
        """Ends the line."""
        self._write("]\n" if self._bracket else "\n")
        self._bracket = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
