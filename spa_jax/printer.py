"""Prints a generation as it comes, each piece of text in the style of its source."""

import sys

from rich.console import Console
from rich.text import Text

DEVICE_STYLE = "bold magenta"


class Printer:
    """Text of tokens for which the device was asked is coloured, or [bracketed] where the output is no terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bracket = False

    @property
    def marked(self) -> str:
        """How the device's tokens are told apart."""
        return "coloured" if self._console.is_terminal else "in brackets"

    def add(self, piece: str, consulted: bool) -> None:
        """Prints the text of one token; of an empty one, nothing."""
        if not piece:
            return
        if self._console.is_terminal:
            self._console.print(Text(piece, style=DEVICE_STYLE if consulted else ""), end="")
            return
        if consulted != self._bracket:
            space = piece[: len(piece) - len(piece.lstrip())]
            self._write(f"{space}[" if consulted else "]")
            piece = piece[len(space) :] if consulted else piece
            self._bracket = consulted
        self._write(piece)

    def finish(self) -> None:
        """Ends the line."""
        self._write("]\n" if self._bracket else "\n")
        self._bracket = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
