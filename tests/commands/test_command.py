"""Promises of all commands to users, seen in processes; other tests see refusals in their own, by `command_here`."""

import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from spa_jax.command import print_error
from spa_jax.printer import Printer
from spa_jax.terminal import Mode, converse

CASES = {
    "spa_jax.train": "both --config=FILE and --workdir=DIR are needed",
    "spa_jax.evaluate": "--output=DIR is needed, and --task=NAME or --data=FILE",
    "spa_jax.generate": "give either --prompt='...' or --interactive",
    "spa_jax.serve": "say which half this is",
    "spa_jax.aot": "--config=FILE is needed",
}


@pytest.mark.parametrize("module", CASES)
def test_a_refusal_is_one_line_and_status_2(module, command, command_here):
    result = command(module)
    result.assert_refused(CASES[module])
    assert result == command_here(module)


@pytest.mark.parametrize("module", CASES)
def test_an_unknown_flag_is_refused_so_too(module, command, command_here):
    result = command(module, "--flg=1")
    result.assert_refused("Unknown command line flag 'flg'")
    assert result == command_here(module, "--flg=1")


@pytest.mark.parametrize(
    "arguments", [["spa_jax.generate"], ["spa_jax.serve", "cloud", "--host=0.0.0.0"], ["spa_jax.serve", "device"]]
)
def test_a_mistake_is_told_before_what_takes_seconds_is_imported(arguments):
    script = (
        f"import runpy, sys; sys.argv = {arguments!r}\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as ended: print(ended.code, *{'jax', 'transformers', 'flax'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr[:7]) == ("2\n", "error: ")


EVIL = {
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b2J": "\\x9b2J",
    "\u202egnp.exe\u2066": "\\u202egnp.exe\\u2066",
    "a\rb": "a\\rb",
    "\x08\x7f\0": "\\x08\\x7f\\x00",
    "a\ttab\nand line": "a\ttab\nand line",
    "caf\u00e9 \u05d0 \u65e5": "caf\u00e9 \u05d0 \u65e5",
}
"""Text, and what a terminal is shown of it."""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_a_terminal_would_take_for_commands_is_shown(is_terminal, on_terminal, monkeypatch):
    def main():
        printer = Printer()
        monkeypatch.setattr(printer, "_console", Console(highlight=False, soft_wrap=True, force_terminal=is_terminal))
        for piece in "".join(EVIL):
            printer.add(piece, False)
        printer.finish()
        for text in EVIL:
            logging.getLogger("spa_jax").warning("%s", text)
            print_error(text)

    out, err = (written.decode() for written in on_terminal(main))
    assert "".join(out.split()) == "".join("".join(EVIL.values()).split())  # rich makes spaces of a tab
    assert ("\n" in out[:-1], "\t" in out) == (True, not is_terminal)
    for text, shown in EVIL.items():
        assert shown.expandtabs() + "\n" in err
        assert text not in err or text == shown
    assert all(character.isprintable() or character in "\n\t" for character in out + err)


def test_on_a_terminal_what_is_waited_for_stands_behind_the_text_until_more_comes(on_terminal, monkeypatch):
    def main():
        for is_terminal in (True, False):
            printer = Printer()
            console = Console(highlight=False, soft_wrap=True, force_terminal=is_terminal, width=30)
            monkeypatch.setattr(printer, "_console", console)
            for text in ("hello", " you", "x" * 20, "\ny"):
                printer.wait("one: 1 s")
                printer.wait("two: 2 s")
                printer.add(text, False)
            printer.wait("three: 3 s")
            printer.finish()

    out, _ = on_terminal(main)
    waits = "".join(f"\x1b7 \x1b[2m{what}\x1b[0m\x1b[K\x1b8" for what in ("one: 1 s", "two: 2 s"))
    last = "\x1b7 \x1b[2mthree: 3 s\x1b[0m\x1b[K\x1b8\x1b[K"
    clear = "\x1b[K"
    assert out.decode() == (
        f"{waits}{clear}hello{waits}{clear} you{waits}{clear}{'x' * 20}\ny{last}\n" + f"hello you{'x' * 20}\ny\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_a_character_shows_its_escape(encoding, on_terminal):
    """As on standard error, where Python does so itself."""

    def main():
        printer = Printer()
        printer.add("caf\u00e9 \u65e5", False)
        printer.finish()
        print("path \udcff")

    out, _ = on_terminal(main, encoding=encoding)
    assert out == "caf\u00e9 \u65e5\npath \udcff\n".encode(encoding, errors="backslashreplace")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in the middle"])
def test_output_that_nobody_reads_on_ends_the_command_silently(lines):
    printing = f"from spa_jax import command; command.run(lambda: [print('line') for _ in range({lines})])"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as output:
        process = subprocess.run([sys.executable, "-c", printing], stdout=output, stderr=subprocess.PIPE, check=False)
    assert process.stderr == b""
    assert process.returncode == 1


def test_another_connection_that_breaks_is_no_matter_of_the_output():
    code = "from spa_jax import command\ndef main(): raise BrokenPipeError('of the network')\ncommand.run(main)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert b"BrokenPipeError: of the network" in process.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_is_typed_and_is_no_text_is_refused_and_the_terminal_goes_on(encoding, on_terminal):
    asked = []
    typed = b"one\n" + b"\xff\n" + b"x" * 10_000 + b"\n\n  two \xe2\x82\n" + b"three\n"

    def answer(talk, mode):
        asked.append(talk.turns[-1][0].content)
        return "", []

    _, err = on_terminal(lambda: converse(answer, Mode()), typed, encoding)
    assert asked == ["one", "x" * 10_000, "three"]
    assert [line.partition(b", half")[0] for line in err.splitlines()] == [
        b"error: the prompt is not text: character 1 is '\\udcff'",
        b"error: the prompt is not text: character 5 is '\\udce2'",
    ]


@pytest.mark.parametrize(("module", "role"), [("spa_jax.generate", ()), ("spa_jax.serve", ("device",))])
@pytest.mark.parametrize(
    ("prompt", "message"), [("hi \udcff", "the prompt is not text: character 4"), (" ", "is empty")]
)
def test_a_prompt_that_is_no_text_is_refused(module, role, prompt, message, command_here):
    command_here(module, *role, "--plugin=none", f"--prompt={prompt}").assert_refused(message)
