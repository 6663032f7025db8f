"""`python -m spa_jax.serve` as its user meets it."""

import json
import re
import socket
import urllib.request

import pytest

from spa_jax.split.cloud_process import cloud_process

SERVE, GENERATE = "spa_jax.serve", "spa_jax.generate"
ASK = ["--prompt=What is thing 1?", "--max_new_tokens=12"]


@pytest.fixture(scope="module")
def plugin(trained):
    return trained[0] / "plugin"


@pytest.fixture(scope="module")
def head(command, tiny_backbone_directory, tmp_path_factory):
    """The LM head in a file, as the command leaves it."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    result = command(SERVE, "head", f"--backbone={tiny_backbone_directory}", f"--output={path}")
    assert result.status == 0, result.err
    return path


@pytest.fixture(scope="module")
def cloud(tiny_backbone_directory, tmp_path_factory):
    """A running cloud, its log, and the port of its metrics."""
    log = tmp_path_factory.mktemp("log") / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with cloud_process(str(tiny_backbone_directory), "--deadline=60", f"--metrics_port={port}", log=log) as process:
        yield process, log, port


@pytest.fixture(scope="module")
def here(command, plugin, tmp_path_factory):
    """Returns the answer of one program, as --output writes it."""
    output = tmp_path_factory.mktemp("here") / "answer.json"
    assert command(GENERATE, f"--plugin={plugin}", *ASK, f"--output={output}").status == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("reply", ["correction", "token"])
def test_a_device_prints_the_answer_with_the_source_of_each_token(reply, command, cloud, plugin, head, here, tmp_path):
    process, log, _ = cloud
    own = [f"--head={head}"] if reply == "token" else []
    result = command(
        SERVE, "device", f"--plugin={plugin}", f"--cloud={process.address}", *ASK, f"--reply={reply}", *own,
        f"--output={tmp_path}/answer.json",
    )  # fmt: skip
    assert result.status == 0, result.err
    said = json.loads((tmp_path / "answer.json").read_text())
    assert {key: said[key] for key in ("prompt", "text", "tokens", "sources")} == {
        key: here[key] for key in ("prompt", "text", "tokens", "sources")
    }
    assert (said["exchanges"], said["degraded"]) == (said["sources"].count("device"), 0)
    shown, _, report = result.out.partition("\n")
    assert shown.replace("[", "").replace("]", "") == here["text"]
    assert "[" in shown
    assert re.fullmatch(
        rf"{len(here['tokens'])} tokens, consulted share \d\.\d\d; \d+ exchanges, [\d,]+ bytes down and [\d,]+ up, "
        r"0 tokens degraded \(tokens from the plugin in brackets\)\n",
        report,
    )
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("6 tokens, 0 degraded" in entry["message"] for entry in entries)
    assert "thing" not in log.read_text()


def test_a_device_says_what_an_opening_took(command, cloud, opening_plugin, tmp_path):
    said = {}
    for module, *where in ([GENERATE], [SERVE, "device", f"--cloud={cloud[0].address}"]):
        output = tmp_path / f"{module}.json"
        result = command(module, *where, f"--plugin={opening_plugin}", *ASK, f"--output={output}")
        assert result.status == 0, result.err
        said[module] = json.loads(output.read_text())
    device = said[SERVE]
    assert (device["tokens"], device["sources"]) == (said[GENERATE]["tokens"], said[GENERATE]["sources"])
    assert (device["exchanges"], device["opening_exchanges"]) == (len(device["tokens"]) - 1, 1)
    assert (device["uncorrected_prompts"], device["degraded"]) == (0, 0)
    assert "0 tokens degraded; 1 opening exchange (tokens from the plugin in brackets)" in result.out


def test_the_cloud_counts_what_it_does(command, cloud, plugin):
    def counted():
        with urllib.request.urlopen(f"http://127.0.0.1:{cloud[2]}/metrics") as page:
            lines = [line.split() for line in page.read().decode().splitlines() if line.startswith("spa_")]
        return {line[0]: float(line[1]) for line in lines}

    before = counted()
    assert command(SERVE, "device", f"--plugin={plugin}", f"--cloud={cloud[0].address}", *ASK).status == 0
    more = {name: value - before[name] for name, value in counted().items()}
    assert (more["spa_tokens_total"], more["spa_degraded_tokens_total"]) == (6, 0)
    assert 0 < more["spa_exchanges_total"] == more["spa_seconds_per_exchange_count"] <= 6
    assert more["spa_bytes_down_total"] > more["spa_exchanges_total"] * 3 * 32 * 4
    assert more["spa_bytes_up_total"] > more["spa_exchanges_total"] * 32 * 4
    assert more["spa_seconds_to_first_token_count"] == more["spa_seconds_per_token_count"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say which half this is: python -m spa_jax.serve cloud, or python -m spa_jax.serve device"),
        (["device"], "name a plugin with --plugin=DIR"),
        (["device", "--plugin=PLUGIN"], "give either --prompt='...' or --interactive"),
        (["device", "--plugin=PLUGIN", "--prompt= "], "the prompt is empty"),
        (["device", "--plugin=PLUGIN", *ASK, "--cloud=cloud.example.org:8470"], "in the clear"),
        (["device", "--plugin=PLUGIN", *ASK, "--reply=token"], "--reply=token needs --head=FILE"),
        (["device", "--plugin=PLUGIN", *ASK, "--reply=token", "--head=none"], "cannot read the LM head 'none'"),
        (["device", "--plugin=PLUGIN", *ASK, "--temperature=-1"], "temperature is -1"),
        (["head"], "name the file to write with --output=FILE"),
        (["cloud", "--host=0.0.0.0"], "without TLS"),
        (["cloud", "--tls_cert=none"], "TLS needs both --tls_cert and --tls_key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_will_not_do_is_refused_in_one_line(arguments, says, command_here, plugin, tiny_backbone_directory):
    own = [f"--backbone={tiny_backbone_directory}"] if arguments[:1] == ["cloud"] else []
    command_here(SERVE, *(argument.replace("PLUGIN", str(plugin)) for argument in arguments), *own).assert_refused(says)


def test_tokens_of_a_plugin_that_enters_in_front_of_a_block_are_refused(command_here, opening_plugin, head):
    arguments = [f"--plugin={opening_plugin}", *ASK, "--reply=token", f"--head={head}"]
    command_here(SERVE, "device", *arguments).assert_refused("in front of block 2")


def test_beam_search_with_tokens_is_refused(command_here, plugin, head):
    arguments = [f"--plugin={plugin}", *ASK, "--reply=token", f"--head={head}", "--beams=2"]
    result = command_here(SERVE, "device", *arguments)
    assert result.status == 2
    assert "reply mode 'token' can only be greedy or sample" in result.err


def test_a_cloud_that_is_not_there_is_named(command_here, plugin):
    result = command_here(SERVE, "device", f"--plugin={plugin}", *ASK, "--cloud=127.0.0.1:9")
    assert result.status == 2
    assert "the cloud at 127.0.0.1:9 is gone" in result.err
