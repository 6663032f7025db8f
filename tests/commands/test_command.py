"""Promises of all commands to users, seen in processes; other tests see refusals in their own, by `command_here`."""

import pytest

from spa_jax import command as commands
from spa_jax.printer import Printer

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


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_is_typed_and_is_no_text_is_refused_and_the_terminal_goes_on(encoding, on_terminal):
    asked = []
    typed = b"one\n" + b"\xff\n" + b"x" * 10_000 + b"\n\n  two \xe2\x82\n" + b"three\n"
    _, err = on_terminal(lambda: asked.extend(commands.typed_prompts()), typed, encoding)
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
