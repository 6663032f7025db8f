"""`python -m spa_jax.evaluate` as its user meets it."""

import json

import pytest


def test_an_evaluation_of_one_row_says_that_there_is_no_interval(command, tiny_backbone_directory, tmp_path):
    row = {"question": "Да?", "correct_answer": "да"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    where = [f"--backbone={tiny_backbone_directory}", f"--data={tmp_path}", f"--output={tmp_path}"]
    result = command("spa_jax.evaluate", "--task=sciq", *where, "--beams=1", "--rouge_tokenizer=unicode")
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    (line,) = (line for line in result.out.splitlines() if "score/rougeL " in line)
    assert "none, of one row" in line
    text = (tmp_path / "evaluation.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["score/rougeL"][1:] == [None, None]
    assert written["evaluation"]["rouge_tokenizer"] == "unicode"
