"""`python -m spa_jax.generate` as its user meets it."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from spa_jax.data.encoding import Encoder
from spa_jax.data.text import visible
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.models.peft import PeftConfig, init_peft
from spa_jax.weights.huggingface import load_directory, load_tokenizer
from spa_jax.weights.peft import PeftPlugin
from spa_jax.weights.plugin import load_plugin

GENERATE = "spa_jax.generate"
PROMPT = "--prompt=What is thing 1?"


@pytest.fixture(scope="module")
def plugin(trained):
    return trained[0] / "plugin"


@pytest.fixture(scope="module")
def answer(command, plugin, tmp_path_factory):
    """Returns a function that asks for at most 12 tokens, and gives what --output says and what was printed."""

    @functools.cache
    def ask(*arguments):
        output = tmp_path_factory.mktemp("answer") / "answer.json"
        few = ["--max_new_tokens=12", f"--output={output}"]
        result = command(GENERATE, f"--plugin={plugin}", PROMPT, *few, *arguments)
        assert result.status == 0, result.err
        return json.loads(output.read_text()), result.out

    return ask


def test_the_answer_is_the_one_it_was_taught_with_a_source_for_each_token(answer, tiny_backbone_directory):
    said, printed = answer()
    assert set(said) == {"prompt", "text", "tokens", "sources", "consulted_share"}
    assert said["prompt"] == "What is thing 1?"
    assert said["text"] == "a cat"
    tokenizer = load_tokenizer(tiny_backbone_directory)
    assert tokenizer.decode(said["tokens"]) == "a cat</s>"
    assert len(said["sources"]) == 6
    assert set(said["sources"]) <= {"cloud", "device"}
    assert said["consulted_share"] == said["sources"].count("device") / 6 > 0.5
    shown, _, report = printed.partition("\n")
    assert shown.replace("[", "").replace("]", "") == "a cat"
    assert "[" in shown
    assert report.startswith("6 tokens in ")
    assert f"consulted share {said['consulted_share']:.2f} (tokens from the plugin in brackets)" in report


def test_base_never_asks_the_device(answer):
    said, printed = answer("--setting=base")
    assert said["text"] != "a cat"
    assert set(said["sources"]) == {"cloud"}
    assert said["consulted_share"] == 0
    assert "consulted share 0.00" in printed


def test_the_threshold_moves_the_share_from_all_to_none(answer):
    assert answer("--threshold=0")[0]["consulted_share"] == 1
    never, _ = answer("--threshold=1")
    assert never["consulted_share"] == 0
    assert never["tokens"] == answer("--setting=base")[0]["tokens"]


@pytest.mark.slow
def test_two_programs_say_what_one_does_and_what_it_cost(answer):
    for search in ((), ("--beams=3",)):
        one, _ = answer(*search)
        two, printed = answer("--channel=in-process", *search)
        assert (two["tokens"], two["sources"]) == (one["tokens"], one["sources"])
        assert two["exchanges"] >= two["sources"].count("device") > 0
        assert two["ratio"] == two["exchanges"] / len(two["tokens"])
        assert min(two["bytes_up"], two["bytes_down"], two["prefill_bytes"], two["device_seconds"]) > 0
        assert two["network_seconds"] == two["degraded"] == 0
        assert f"{two['exchanges']} exchanges (ratio M {two['ratio']:.2f})" in printed


@pytest.mark.slow
def test_two_processes_say_what_one_does(plugin, tmp_path, environment):
    said = {}
    for channel in ("none", "grpc"):
        output = tmp_path / f"{channel}.json"
        arguments = ["-m", GENERATE, f"--plugin={plugin}", PROMPT, "--max_new_tokens=12", f"--output={output}"]
        command = [sys.executable, *arguments, f"--channel={channel}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        said[channel] = json.loads(output.read_text())
    assert (said["grpc"]["tokens"], said["grpc"]["sources"]) == (said["none"]["tokens"], said["none"]["sources"])
    assert said["grpc"]["exchanges"] == said["grpc"]["sources"].count("device")


def test_a_simulated_network_takes_what_its_flags_say(answer):
    near, _ = answer("--channel=simulated", "--tau=0.5", "--down=1e12", "--up=1e12", "--deadline=9")
    assert near["network_seconds"] == pytest.approx(0.5 * near["exchanges"], rel=1e-3)
    assert near["tokens"] == answer()[0]["tokens"]
    gone, _ = answer("--channel=simulated", "--deadline=0.001")
    assert gone["degraded"] == gone["exchanges"] == len(gone["tokens"]) > 0
    assert gone["tokens"] == answer("--setting=base")[0]["tokens"]


def test_an_opening_is_counted_apart_and_one_that_fails_is_said(command, opening_plugin, tmp_path):
    def answer(*arguments):
        output = tmp_path / "answer.json"
        few = ["--max_new_tokens=4", f"--output={output}"]
        result = command(GENERATE, f"--plugin={opening_plugin}", PROMPT, *few, *arguments)
        assert result.status == 0, result.err
        return json.loads(output.read_text()), result.out

    one, _ = answer()
    two, printed = answer("--channel=simulated", "--tau=0.5", "--down=1e12", "--up=1e12", "--deadline=9")
    assert two["tokens"] == one["tokens"]
    assert (two["exchanges"], two["opening_exchanges"], two["uncorrected_prompts"]) == (len(one["tokens"]) - 1, 1, 0)
    assert two["opening_seconds"] == pytest.approx(0.5, rel=1e-3)
    assert two["network_seconds"] == pytest.approx(0.5 * two["exchanges"], rel=1e-3)
    assert "; 1 opening exchange in 0.50 s" in printed
    gone, printed = answer("--channel=simulated", "--deadline=0.001")
    assert (gone["opening_exchanges"], gone["uncorrected_prompts"], gone["degraded"]) == (1, 1, len(gone["tokens"]) - 1)
    assert "in vain: the prompt is uncorrected" in printed
    assert gone["tokens"] != one["tokens"]


@pytest.mark.slow
def test_fewer_bytes_by_a_smaller_codec(answer):
    full, small = (answer("--channel=in-process", f"--codec={codec}")[0] for codec in ("float32", "int8"))
    assert small["tokens"] == full["tokens"]
    assert small["bytes_down"] < 0.5 * full["bytes_down"]


def test_a_seed_says_the_same_again(answer):
    hot = ("--temperature=5", "--seed=1")
    assert answer(*hot)[0] == answer.__wrapped__(*hot)[0]
    assert answer(*hot)[0] != answer("--temperature=5", "--seed=2")[0]


def test_a_last_character_that_is_not_complete_is_printed_as_the_whole_text_has_it(
    command_here, tiny_backbone_directory, tmp_path
):
    random = [f"--backbone={tiny_backbone_directory}", "--temperature=5", "--seed=3", "--max_new_tokens=6"]
    result = command_here(GENERATE, *random, PROMPT, f"--output={tmp_path}/answer.json")
    text = json.loads((tmp_path / "answer.json").read_text())["text"]
    assert text.endswith("\N{REPLACEMENT CHARACTER}")
    assert result.out.startswith(f"{visible(text)}\n6 tokens in "), result.err


def test_a_backbone_alone_answers(command, tiny_backbone_directory, environment):
    arguments = ["-m", GENERATE, f"--backbone={tiny_backbone_directory}", PROMPT, "--max_new_tokens=3"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "3 tokens in " in done.stdout
    assert "consulted share 0.00" in done.stdout


def test_interactive_holds_a_conversation(command, plugin):
    lines = "What is thing 1?\n\n  \nWhat is thing 0?\n/new\nWhat is thing 0?\n"
    result = command(GENERATE, f"--plugin={plugin}", "--interactive", "--max_new_tokens=12", stdin=lines)
    assert result.status == 0, result.err
    assert result.out.count("consulted share") == 3
    first, _, third, _ = result.out.replace("[", "").replace("]", "").split("tokens in")
    assert "a cat\n" in first
    assert "red\n" in third


def test_a_prompt_too_long_or_not_text_does_not_end_an_interactive_session(command, plugin):
    lines = f"{'long ' * 100}\n\udcff\nWhat is thing 0?\n"
    result = command(GENERATE, f"--plugin={plugin}", "--interactive", "--max_new_tokens=12", stdin=lines)
    assert result.status == 0, result.err
    assert "error: the prompt of " in result.err
    assert "error: the prompt is not text" in result.err
    assert "Traceback" not in result.err
    assert result.out.count("consulted share") == 1


GRPC = ["--channel=grpc", "--cloud=127.0.0.1:9"]
REFUSED = {
    "beams and heat": (["--plugin=PLUGIN", PROMPT, "--beams=2", "--temperature=1"], "--beams searches"),
    "negative beams": (["--plugin=PLUGIN", PROMPT, "--beams=-1"], "flag --beams=-1: -1 is not a non-negative"),
    "network": (["--plugin=PLUGIN", PROMPT, "--channel=simulated", "--loss=2"], "makes no sense"),
    "no device": (["--backbone=BACKBONE", PROMPT, "--channel=in-process"], "needs a plugin"),
    "no prompt": (["--plugin=PLUGIN"], "give either --prompt='...' or --interactive"),
    "two prompts": (["--plugin=PLUGIN", PROMPT, "--interactive"], "give either --prompt='...' or --interactive"),
    "empty prompt": (["--plugin=PLUGIN", "--prompt= "], "the prompt is empty"),
    "no model": ([PROMPT], "name a plugin with --plugin=DIR, or a backbone alone"),
    "no file": (["--plugin=PLUGIN", "--interactive", "--output=x.json"], "--output goes with --prompt"),
    "no such plugin": (["--plugin=gone", PROMPT], "no plugin at 'gone'"),
    "the run's directory": (["--plugin=PLUGIN/..", PROMPT], "no plugin at "),
    "unknown setting": (
        ["--plugin=PLUGIN", PROMPT, "--setting=s9"],
        "value should be one of <spa|s1|s2|s3|base>",
    ),
    "other setting": (["--plugin=PLUGIN", PROMPT, "--setting=s3"], "a plugin trained as 'spa' cannot run as 's3'"),
    "setting of nothing": (["--backbone=BACKBONE", PROMPT, "--setting=spa"], "setting 'spa' needs a plugin"),
    "threshold": (
        ["--plugin=PLUGIN", PROMPT, "--threshold=1.5"],
        "flag --threshold=1.5: 1.5 is not a number in",
    ),
    "temperature": (["--plugin=PLUGIN", PROMPT, "--temperature=-1"], "temperature is -1.0, but must be"),
    "no number": (["--plugin=PLUGIN", PROMPT, "--temperature=hot"], "flag --temperature=hot"),
    "top p": (["--plugin=PLUGIN", PROMPT, "--top_p=0"], "top_p is 0.0, but must be"),
    "no threshold": (["--plugin=PLUGIN", PROMPT, "--threshold=nan"], "threshold is nan, but must lie between 0"),
    "nothing new": (["--plugin=PLUGIN", PROMPT, "--max_new_tokens=0"], "flag --max_new_tokens=0: 0 is not a positive"),
    "no authorities": (["--plugin=PLUGIN", PROMPT, *GRPC, "--ca=gone"], "cannot read 'gone'"),
    "no token": (["--plugin=PLUGIN", PROMPT, *GRPC, "--token_file=gone"], "cannot read 'gone'"),
    "too much": (
        ["--plugin=PLUGIN", PROMPT, "--max_new_tokens=128"],
        "do not fit the backbone's context of 128",
    ),
    "another backbone": (["--plugin=PLUGIN", PROMPT, "--backbone=OTHER"], "this plugin was trained on the backbone"),
    "unknown flag": (["--plugin=PLUGIN", PROMPT, "--bems=3"], "Unknown command line flag 'bems'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_line(
    case, command_here, plugin, tiny_backbone_directory, make_backbone_directory
):
    arguments, message = REFUSED[case]
    places = {"PLUGIN": plugin, "BACKBONE": tiny_backbone_directory}
    if case == "another backbone":
        places["OTHER"] = make_backbone_directory(seed=1)
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    command_here(GENERATE, *arguments).assert_refused(message)


@pytest.mark.parametrize(
    "arguments",
    [["--threshold=1.5"], ["--setting=s3"], ["--channel=simulated", "--loss=2"], ["--channel=in-process",
     "--reply=token", "--beams=2"], [*GRPC, "--ca=gone"], ["--beams=2", "--temperature=1"], ["--top_p=0"]],
    ids=" ".join,
)  # fmt: skip
def test_flags_are_checked_before_a_backbone_is_looked_for(arguments, command_here, plugin):
    result = command_here(GENERATE, f"--plugin={plugin}", PROMPT, "--backbone=no/such/place", *arguments)
    assert result.status == 2
    assert "no/such/place" not in result.err


@pytest.mark.parametrize("config", [PeftConfig("lora", 2, 4.0), PeftConfig("adapter", 3)], ids=["lora", "adapter"])
def test_a_lora_and_an_adapter_answer_within_one_program_alone(config, command, tiny_backbone_directory, tmp_path):
    backbone, plugin = load_directory(tiny_backbone_directory), tmp_path / "plugin"
    rng = np.random.default_rng(1)
    shapes = init_peft(config, backbone.config, abstract=True)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    trained = PeftPlugin(config, params, str(tiny_backbone_directory), backbone.fingerprint, "chat")
    trained.save(plugin)
    few, output = "--max_new_tokens=6", tmp_path / "answer.json"
    result = command(GENERATE, f"--plugin={plugin}", PROMPT, few, "--beams=3", f"--output={output}")
    assert result.status == 0, result.err
    prompt = Encoder(backbone.tokenizer, "chat", 128).prompt("What is thing 1?")
    (expected,) = FusedModel(backbone, trained).generate([prompt], 6, beams=Beams(3))
    said = json.loads(output.read_text())
    assert said["tokens"] == expected.tokens
    assert said["consulted_share"] == 1
    refused = command(GENERATE, f"--plugin={plugin}", PROMPT, few, "--channel=simulated")
    refused.assert_refused(
        f"--channel=simulated leads to a side network, and a '{config.setting}' works within the backbone: use "
        "--channel=none (experiments.benchmarks.table2_network counts"
    )


def _with_config(plugin, copy, **changed):
    """Copies a plugin with other values in its config, `taps` among them."""
    shutil.copytree(plugin, copy)
    description = json.loads((copy / "plugin_config.json").read_text())
    description["config"]["side"]["taps"] = changed.pop("taps", description["config"]["side"]["taps"])
    description["config"] |= changed
    (copy / "plugin_config.json").write_text(json.dumps(description))
    return copy


def test_an_entry_that_cannot_be_is_refused_in_one_line(command_here, opening_plugin, tmp_path):
    for number, (changed, says) in enumerate(
        [
            ({"taps": [0, 3]}, "a side network that enters at 2 cannot read the taps [0, 3]"),
            ({"entry": "head"}, "edits 'all' do not go with a plugin that enters at head"),
            ({"setting": "spa", "offset": True}, "enters at 2 whose router has an offset"),
            ({"entry": -1}, "a side network that enters at -1 cannot read the taps [0, 2]"),
            ({"entry": 3}, "enters in front of block 3, and"),
        ]
    ):
        plugin = _with_config(opening_plugin, tmp_path / str(number), **changed)
        command_here(GENERATE, f"--plugin={plugin}", PROMPT).assert_refused(says)
    token = ["--channel=in-process", "--reply=token"]
    command_here(GENERATE, f"--plugin={opening_plugin}", PROMPT, *token).assert_refused("in front of block 2")


def test_a_damaged_plugin_is_one_message(command_here, plugin, tmp_path):
    copy = tmp_path / "plugin"
    shutil.copytree(plugin, copy)
    weights = (copy / "plugin.safetensors").read_bytes()
    (copy / "plugin.safetensors").write_bytes(weights[:-1])
    command_here(GENERATE, f"--plugin={copy}", PROMPT).assert_refused(f"cannot read '{copy}/plugin.safetensors'")
    (copy / "plugin.safetensors").write_bytes(weights)
    assert load_plugin(copy).config.setting == "spa"


def test_an_output_that_cannot_be_written_is_one_message(command, plugin, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = command(GENERATE, f"--plugin={plugin}", PROMPT, f"--output={tmp_path}/file/x", "--max_new_tokens=12")
    assert (result.status, result.err.splitlines()[-1][:21]) == (2, "error: cannot write '")
    assert (tmp_path / "file").read_text() == "mine"
