"""`python -m spa_jax.serve` as its user meets it."""

import concurrent.futures
import json
import re
import socket
import urllib.request

import grpc
import pytest

from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.grpc_channel import METHOD, SERVICE
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Opened
from spa_jax.split.wire import VERSION

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
def cloud(tiny_backbone_directory, free_port, tmp_path_factory):
    """A running cloud, its log, and the port of its metrics."""
    log = tmp_path_factory.mktemp("log") / "log"
    port = free_port()
    with cloud_process(str(tiny_backbone_directory), "--deadline=600", f"--metrics_port={port}", log=log) as process:
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


@pytest.mark.parametrize("how", [(), ("--beams=2",), ("--setting=base",)], ids=" ".join)
def test_generate_says_over_a_network_what_it_says_in_one_program(how, command, cloud, plugin, tmp_path):
    said = []
    for where in ([], ["--channel=grpc", f"--cloud={cloud[0].address}"]):
        output = tmp_path / "answer.json"
        result = command(GENERATE, f"--plugin={plugin}", *ASK, *how, *where, f"--output={output}")
        assert result.status == 0, result.err
        said.append(json.loads(output.read_text()) | {"shown": result.out.partition("\n")[0]})
    one, two = said
    assert {key: two[key] for key in one} == one
    assert two["exchanges"] >= two["sources"].count("device")


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
            lines = [line.split() for line in page.read().decode().splitlines() if not line.startswith("#")]
        assert all(name.startswith("spa_") for name, _ in lines)
        return {name: float(value) for name, value in lines}

    before = counted()
    assert (
        command(SERVE, "device", f"--plugin={plugin}", f"--cloud={cloud[0].address}", *ASK, "--threshold=0").status == 0
    )
    more = {name: value - before[name] for name, value in counted().items()}
    assert (more["spa_tokens_total"], more["spa_degraded_tokens_total"]) == (6, 0)
    assert 0 < more["spa_exchanges_total"] == more["spa_seconds_per_exchange_count"] <= 6
    assert more["spa_bytes_down_total"] > more["spa_exchanges_total"] * 3 * 32 * 4
    assert more["spa_bytes_up_total"] > more["spa_exchanges_total"] * 32 * 4
    assert more["spa_seconds_to_first_token_count"] == more["spa_seconds_per_token_count"] == 1
    assert more["spa_seconds_between_tokens_count"] == 5
    assert more["spa_steps_total"] == more["spa_step_rows_total"] == 6
    assert more["spa_prompt_tokens_total"] > 0 < more["spa_step_seconds_total"]
    assert (more["spa_sessions"], more["spa_queue"], more["spa_deadlines_missed_total"]) == (0, 0, 0)


def test_a_reader_of_metrics_that_says_nothing_keeps_others_waiting_for_a_while_only(cloud):
    silent = socket.create_connection(("127.0.0.1", cloud[2]))
    with silent, urllib.request.urlopen(f"http://127.0.0.1:{cloud[2]}/metrics", timeout=60) as page:
        assert b"spa_steps_total" in page.read()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say which half this is: python -m spa_jax.serve cloud, or python -m spa_jax.serve device"),
        (["clowd"], "say which half this is: python -m spa_jax.serve cloud, or python -m spa_jax.serve device"),
        (["cloud", "--plugin=PLUGIN"], "Unknown command line flag 'plugin'"),
        (["device", "--plugin=PLUGIN", *ASK, "--host=0.0.0.0"], "Unknown command line flag 'host'"),
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


EVIL = ["\x1b", "]0;title\x07", "\x9b2J \u202egnp.exe"]


@pytest.mark.parametrize("module", [(SERVE, "device"), (GENERATE, "--channel=grpc")], ids=lambda each: each[0])
@pytest.mark.parametrize(
    ("said", "status"),
    [
        (
            {"progress": {"generated": [{"tokens": [1, 2, 3], "consulted": [True] * 3, "pieces": EVIL}], "done": True}},
            0,
        ),
        ({"refusal": {"kind": EVIL[1], "reason": "".join(EVIL)}}, 2),
    ],
    ids=["answer", "refusal"],
)
def test_what_a_cloud_says_is_no_command_to_a_terminal(said, status, module, command_here, plugin):
    def serve(requests, context):
        (prompt,) = FromDevice.FromString(next(requests)).open.prompts
        yield FromCloud(opened=Opened(session="s", version=VERSION, lengths=[len(prompt.tokens) or 20]))
        yield FromCloud(**said)

    handler = grpc.stream_stream_rpc_method_handler(serve, response_serializer=FromCloud.SerializeToString)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        result = command_here(*module, f"--plugin={plugin}", *ASK, f"--cloud=127.0.0.1:{port}")
        server.stop(None)
    assert result.status == status, result.err
    assert all(character.isprintable() or character == "\n" for character in result.out + result.err)


def test_a_cloud_that_is_not_there_is_named(command_here, plugin):
    result = command_here(SERVE, "device", f"--plugin={plugin}", *ASK, "--cloud=127.0.0.1:9")
    assert result.status == 2
    assert "error: cannot reach the cloud at 127.0.0.1:9 (Connection refused): does it run" in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--deadline=0"], "deadline is 0"), (["--memory=-1"], "memory is -1"), (["--tokens=gone"], "cannot read 'gone'"),
     (["--memory=inf"], "--memory is inf GiB"), (["--memory=nan"], "--memory is nan GiB"),
     (["--queue=-1"], "queue is -1, but must not be below 0"), (["--share_prefixes=token"], "--tokens"),
     (["--port=8470", "--metrics_port=8470"], "--port and --metrics_port are both 8470"),
     (["--tls_cert=gone", "--tls_key=gone"], "cannot read 'gone'"), (["--host=0.0.0.0"], "without TLS"),
     (["--port=TAKEN"], "cannot listen on 127.0.0.1:"), (["--metrics_port=TAKEN"], "cannot serve metrics on 127.0")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_cloud_checks_its_flags_before_its_backbone_is_looked_for(arguments, says, command_here):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = [argument.replace("TAKEN", str(taken.getsockname()[1])) for argument in arguments]
        command_here(SERVE, "cloud", "--backbone=no/such/place", "--port=0", *own).assert_refused(says)


@pytest.mark.parametrize(
    ("flag", "says"), [("--ca=gone", "cannot read 'gone'"), ("--token_file=gone", "cannot read 'gone'"),
                       ("--silence=-1", "silence is -1"), ("--patience=0", "patience is 0"),
                       ("--threshold=3", "--threshold=3"), ("--max_new_tokens=0", "--max_new_tokens=0")],
)  # fmt: skip
def test_a_device_checks_its_flags_before_its_plugin_is_looked_for(flag, says, command_here):
    command_here(SERVE, "device", "--plugin=no/such/place", *ASK, flag).assert_refused(says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--http=8471"], "--http is '8471'"), (["--http=0.0.0.0:0"], "listens to other machines"),
     (["--http=127.0.0.1:TAKEN"], "cannot listen on 127.0.0.1:"),
     (["--http=127.0.0.1:0", "--http_key_file=gone"], "cannot read 'gone'")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_an_endpoint_checks_its_flags_before_its_plugins_are_looked_for(flags, says, command_here):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = [flag.replace("TAKEN", str(taken.getsockname()[1])) for flag in flags]
        command_here(SERVE, "device", "--plugin=no/such/place", *own).assert_refused(says)


def test_an_endpoint_refuses_at_once_what_no_request_could_be_answered_with(command_here, plugin):
    result = command_here(SERVE, "device", f"--plugin={plugin}", "--http=127.0.0.1:0", "--threshold=nan")
    result.assert_refused("threshold is nan")
