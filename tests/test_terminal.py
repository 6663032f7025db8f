"""A conversation on a terminal: what is asked in which turn, what its commands do, and what an error leaves."""

import io
import os
import pty
import subprocess
import sys

import pytest

from spa_jax.data.row_formats import read_pairs
from spa_jax.errors import UserError
from spa_jax.terminal import OWN, Mode, converse


@pytest.fixture
def hold(monkeypatch, capsys):
    """Types lines in; returns the conversations that are answered, with their modes, and the standard error."""

    def hold(*lines, says=lambda question: f"answer to {question}", mode=OWN):
        seen = []

        def answer(talk, mode):
            question = talk.turns[-1][0].content
            seen.append(([(turn.role[0], turn.content) for turn, _ in talk.turns], mode))
            return says(question), [1, 2]

        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        converse(answer, mode)
        return seen, capsys.readouterr().err

    return hold


def test_each_line_is_the_next_turn(hold):
    seen, err = hold("a", "", "b")
    assert [talk for talk, _ in seen] == [[("u", "a")], [("u", "a"), ("a", "answer to a"), ("u", "b")]]
    assert err == ""


def test_another_conversation_has_the_same_instructions(hold):
    seen, _ = hold("a", "/system Be brief.", "b", "/new", "c", "/system", "d")
    told = ("s", "Be brief.")
    assert [talk for talk, _ in seen] == [[("u", "a")], [told, ("u", "b")], [told, ("u", "c")], [("u", "d")]]


def test_instructions_that_are_refused_leave_those_before(hold):
    seen, err = hold("/system Be brief.", "/system \udcff", "/new", "a")
    assert [talk for talk, _ in seen] == [[("s", "Be brief."), ("u", "a")]]
    assert len(err.splitlines()) == 1


def test_setting_and_threshold_change_from_there_on(hold):
    seen, _ = hold("a", "/setting base", "b", "/threshold 0.25", "c", "/setting", "/threshold", "d", mode=Mode("s1"))
    assert [mode for _, mode in seen] == [Mode("s1"), Mode("base"), Mode("base", 0.25), Mode()]
    assert len(seen[-1][0]) == 7


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/setting s9", "there is no setting 's9'; settings are spa, s1, s2, s3, base"),
        ("/threshold high", "the threshold is 'high', but must be a number between 0 and 1"),
        ("/threshold 1.5", "the threshold is '1.5'"),
        ("/threshold nan", "the threshold is 'nan'"),
        ("/save", "name a file: /save FILE"),
        ("/save x.jsonl", "there is no answer yet that could be saved"),
        ("/bye", "there is no command /bye"),
    ],
)
def test_what_makes_no_sense_is_said_and_changes_nothing(line, reason, hold):
    seen, err = hold(line, "a")
    assert err.startswith(f"error: {reason}")
    assert seen == [([("u", "a")], Mode())]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("too long")], ids=repr)
def test_an_answer_that_is_interrupted_leaves_the_conversation_as_it_was(error, hold):
    def says(question):
        if question == "b":
            raise error
        return question.upper()

    seen, err = hold("a", "b", "c", says=says)
    assert [talk for talk, _ in seen][-1] == [("u", "a"), ("a", "A"), ("u", "c")]
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_saved_conversations_are_rows_to_train_on(hold, tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text('{"source": "x", "target": "y"}')  # of another format, and without a line's end
    hold("/system Be brief.", "a \u00e9", "b", f"/save {file}", "/new", "c", f"/save {file}")
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join(others))
    assert first == '{"source": "x", "target": "y"}'
    one, two = read_pairs(str(file))
    assert [(pair.source, pair.target) for pair in one.turns] == [
        ("a \u00e9", "answer to a \u00e9"),
        ("b", "answer to b"),
    ]
    assert one.context[0].content == two.context[0].content == "Be brief."


def test_an_arrow_brings_back_the_line_before():
    code = (
        "from spa_jax.terminal import OWN, converse\n"
        "converse(lambda talk, _: (print('asked', len(talk.turns), talk.turns[-1][0].content), 'x', [1])[1:], OWN)"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        seen = b""
        for typed, told in ((b"", b"> "), (b"who?\r", b"asked 1 who?"), (b"\x1b[A\r", b"asked 3 who?")):
            os.write(ours, typed)
            while told not in seen:
                seen += os.read(ours, 1024)
        running.kill()
    os.close(ours)


def test_a_file_that_cannot_be_written_is_named(hold, tmp_path):
    _, err = hold("a", f"/save {tmp_path}", f"/save {tmp_path}/x\0y")
    read, written = err.splitlines()
    assert read.startswith(f"error: cannot read '{tmp_path}'")
    assert written.startswith(rf"error: cannot write '{tmp_path}/x\x00y'")
