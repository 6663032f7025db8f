"""`python -m spa_jax.data check`: what it says will be learnt is what a training run learns."""

import json

import pytest

from spa_jax.training.rows import load_pairs, make_encoder
from spa_jax.weights.huggingface import load_directory, load_tokenizer

DATA = "spa_jax.data"
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "What is my cat called?"},
    {"role": "assistant", "content": "Miso", "weight": 0},
    {"role": "user", "content": "And [my] dog?"},
    {"role": "assistant", "content": "Rex"},
]
QUESTIONS = [
    [{"role": "user", "content": source}, {"role": "assistant", "content": "x"}]
    for source in ("Where did I go to school, and when?", "where did I go to school and when?", "x" * 200)
]


@pytest.fixture
def files(tmp_path):
    """Training rows and held-out rows."""
    paths = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    for path, rows in zip(paths, ([[SYSTEM, *TALK], *QUESTIONS[::2]], [TALK, QUESTIONS[1], QUESTIONS[2]])):
        path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    return tuple(map(str, paths))


@pytest.fixture
def check(command_here, tiny_backbone_directory):
    return lambda *arguments: command_here(DATA, "check", f"--backbone={tiny_backbone_directory}", *arguments)


def test_it_counts_what_is_learnt_and_marks_the_targets_of_a_row(check, files, tiny_backbone_directory, tmp_path):
    train, held_out = files
    result = check(train, f"--eval={held_out}", f"--output={tmp_path}/report.json")
    assert result.status == 0, result.err
    assert "train.jsonl' has 3 rows of messages" in result.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["train"] == {
        "rows": 3, "answers": 4, "answers_learnt": 3, "tokens": 64 + 38 + 128, "target_tokens": 8, "longest": 128,
        "cut": [f"{train}, line 3"],
    }  # fmt: skip
    assert report["overlap"] == {
        "same": [[f"{held_out}, line 1", f"{train}, line 1"], [f"{held_out}, line 3", f"{train}, line 3"]],
        "near": [[f"{held_out}, line 2", f"{train}, line 2"]],
    }
    tokenizer = load_tokenizer(tiny_backbone_directory)
    spans = report["example"]["spans"]
    assert "".join(span["text"] for span in spans) == tokenizer.apply_chat_template([SYSTEM, *TALK], tokenize=False)
    assert [span["text"] for span in spans if span["target"]] == ["Rex</s>"]
    assert result.out.splitlines()[-1] == (
        "<system>Be brief.<user>What is my cat called?<assistant>Miso</s><user>And [my] dog?<assistant>[Rex</s>]"
    )
    last = check(train, f"--eval={held_out}", "--row=3").out
    assert f"{train}, line 3 in the template" in last
    assert last.splitlines()[-1].endswith("<assistant>[x</s>]")
    assert check(train, "--row=4").status == 2
    for line in (
        f"cut at its end: {train}, line 3",
        f"asks the same: held-out {held_out}, line 1 and training {train}, line 1",
        f"asks nearly the same: held-out {held_out}, line 2 and training {train}, line 2",
    ):
        assert line in result.out.splitlines()


def test_its_numbers_are_those_of_a_training_run(check, rows_file, make_config, tiny_backbone_directory, tmp_path):
    config = make_config({"data.eval": "", "data.eval_fraction": 0.3, "data.max_length": 20, "seed": 5})
    options = ["--eval_fraction=0.3", "--max_length=20", "--seed=5", f"--output={tmp_path}/report.json"]
    assert check(str(rows_file), *options).status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    encoder = make_encoder(load_directory(tiny_backbone_directory), config.data)
    for name, pairs in zip(("train", "held_out"), load_pairs(config.data, config.seed)):
        examples, cut = encoder.encode_all(pairs)
        assert report[name]["rows"] == report[name]["answers_learnt"] == len(pairs)
        assert report[name]["tokens"] == sum(len(example.tokens) for example in examples)
        assert report[name]["target_tokens"] == sum(len(example.targets) for example in examples)
        assert len(report[name]["cut"]) == cut > 0


def test_a_data_set_of_the_hub_is_checked_too(check, tmp_path):
    """A directory stands in for one."""
    (tmp_path / "train.csv").write_text("q,a\n" + "".join(f"What is {i}?,00{i}\n" for i in range(10)))
    result = check(f"--hub={tmp_path}", "--columns=source=q,target=a", "--template=plain", "--eval_fraction=0.2")
    assert result.status == 0, result.err
    assert "8" in next(line for line in result.out.splitlines() if "rows" in line)
    assert result.out.splitlines()[-1].startswith("[00")


def test_only_so_many_rows_are_named(check, rows_file):
    result = check(str(rows_file), f"--eval={rows_file}", "--template=plain")
    lines = result.out.splitlines()
    assert len([line for line in lines if line.startswith("asks the same: ")]) == 10
    assert "... and 10 more, which --output=FILE has" in lines


def test_what_training_refuses_is_refused(check, files, command_here, tmp_path):
    check(files[0], f"--eval={files[1]}", "--max_length=20").assert_refused("train.jsonl, line 1: the later turns have")
    check(files[0], "--template=jinja").assert_refused("config key data.template is 'jinja'; choices are")
    check(files[0]).assert_refused("3 rows in ")
    check(files[0], "--columns=source=question").assert_refused(
        "column 'question', which data.columns names, is missing"
    )
    check(f"{tmp_path}/none.csv").assert_refused("cannot read the data file")
    for arguments in ([], ["check"], ["chek", files[0]], ["check", *files], ["check", files[0], "--hub=org/name"]):
        command_here(DATA, *arguments).assert_refused("write `python -m spa_jax.data check FILE`")
