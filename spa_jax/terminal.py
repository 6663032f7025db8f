"""A conversation on a terminal."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from spa_jax.choices import SETTINGS, Setting
from spa_jax.command import print_error
from spa_jax.conversation import Conversation
from spa_jax.data.row_formats import add_conversation
from spa_jax.data.text import check_prompt
from spa_jax.errors import UserError

COMMANDS = """\
/new              begins another conversation, with the same instructions
/system TEXT      gives instructions, and begins another conversation; without a text it takes them back
/setting NAME     answers in another setting, such as base; without a name in the plugin's own
/threshold P      asks the device where p(consult) is above P; without a number above the plugin's own
/save FILE        adds the conversation to a file of rows that can be trained on
/help             shows this
Ctrl-C stops an answer, and Ctrl-D leaves"""


class Mode(NamedTuple):
    """The setting and the threshold to answer with; None for the plugin's own."""

    setting: Setting | None = None
    threshold: float | None = None


OWN = Mode()
Answer = Callable[[Conversation, Mode], tuple[str, Sequence[int]]]
"""Prints the answer to a conversation, and returns its text and tokens."""


def converse(answer: Answer, mode: Mode) -> None:
    """Answers what is typed in until the end of the input, each line as the next turn of a conversation; a line that
    begins with a slash is one of COMMANDS.

    An interruption ends the answer and not the program, and like an error it leaves the conversation as it was.

    Args:
        answer: answers.
        mode: to begin with.

    Raises:
        UserError: standard output cannot be written any more.
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # which some builds of Python lack
            import readline  # noqa: F401  gives `input` keys that edit a line and bring back earlier ones
    dialogue = Dialogue(answer, mode)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of a line that was begun
            print()
            continue
        try:
            if line.startswith("/"):
                dialogue.obey(line)
            elif line:
                dialogue.ask(check_prompt(line))
        except KeyboardInterrupt:
            begin = "\r" if sys.stderr.isatty() else ""  # over the ^C that a terminal shows
            print(f"{begin}stopped: the conversation goes on without this answer", file=sys.stderr)
        except UserError as error:
            print_error(str(error))


@dataclasses.dataclass
class Dialogue:
    """A conversation, and how it is answered.

    Attributes:
        answer: answers.
        mode: with which it does.
        instructions: of the conversation; empty for none.
        talk: the turns so far.
    """

    answer: Answer
    mode: Mode
    instructions: str = ""
    talk: Conversation = dataclasses.field(default_factory=Conversation)

    def ask(self, question: str) -> None:
        """Answers a question."""
        asked = self.talk.asked(question)
        text, tokens = self.answer(asked, self.mode)
        if text.strip():
            self.talk = asked.answered(text, tokens)

    def obey(self, line: str) -> None:
        """Does what a line says that is one of COMMANDS.

        Raises:
            UserError: it is none.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            print(COMMANDS)
        elif name in ("/new", "/system"):
            instructions = value if name == "/system" else self.instructions
            self.talk = Conversation().told(check_prompt(instructions)) if instructions else Conversation()
            self.instructions = instructions
        elif name == "/setting":
            if value and value not in SETTINGS:
                raise UserError(f"there is no setting '{value}'; settings are {', '.join(SETTINGS)}")
            self.mode = self.mode._replace(setting=cast(Setting, value) if value else None)
        elif name == "/threshold":
            self.mode = self.mode._replace(threshold=_fraction(value) if value else None)
        elif name == "/save":
            if not value:
                raise UserError("name a file: /save FILE")
            add_conversation(Path(value), [turn for turn, _ in self.talk.turns])
            print(f"the conversation is in {value}")
        else:
            raise UserError(f"there is no command {name}: /help shows those that there are")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"the threshold is '{text}', but must be a number between 0 and 1")
    return value
