"""Plugins on the hub, which a stand-in on this machine plays; the real one cannot be reached from here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_hub import StandInHub

from spa_jax.errors import UserError
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.weights import hub
from spa_jax.weights.plugin import Plugin

SUMMARY = {"loss/base": 4.0, "loss/spa": 1.25, "router/usage": 0.62}
PUBLISH = """
import json, pathlib, sys
from spa_jax.errors import UserError
from spa_jax.weights import hub, huggingface
huggingface._HUB_TIMEOUT_SECONDS = 120  # of a hub that is there
steps = []
for directory, name, public in json.loads(sys.argv[1]):
    try:
        steps.append(hub.push_plugin(pathlib.Path(directory), name, json.loads(sys.argv[2]), public))
        steps.append(str(hub.plugin_directory(name)))
    except UserError as error:
        steps.append(f"refused: {error}")
try:
    hub.plugin_directory("someone/nothing")
except UserError as error:
    steps.append(f"refused: {error}")
print(json.dumps(steps))
"""


@pytest.fixture
def directory(tmp_path) -> Path:
    config = PluginConfig("spa", SideConfig("tokenwise", 8, (0, 2)), 32)
    Plugin(config, init_plugin(config), "smollm2-135m-instruct", "f" * 32, "chat").save(tmp_path / "plugin")
    return tmp_path / "plugin"


def run(server: StandInHub, tmp_path: Path, *pushes: tuple[str, str, bool], token: str = "hf_right") -> list[str]:
    environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "120", "HF_HUB_ETAG_TIMEOUT": "120"}
    command = [sys.executable, "-c", PUBLISH, json.dumps(pushes), json.dumps(SUMMARY)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_published_plugin_comes_back_byte_for_byte_with_a_card(directory, tmp_path):
    with StandInHub().running() as server:
        address, fetched, nothing = run(server, tmp_path, (str(directory), "someone/mine", False))
    assert address == f"{server.address}/someone/mine"
    assert server.private == [True]
    for name in ("plugin.safetensors", "plugin_config.json"):
        assert (Path(fetched) / name).read_bytes() == (directory / name).read_bytes()
    card = server.files["someone/mine"]["README.md"].decode()
    for said in (
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "library_name: spa_jax", "| with it | 1.250 |",
        "asked for 62 %", "--plugin=someone/mine",
    ):  # fmt: skip
        assert said in card
    assert nothing.startswith("refused: there is no directory 'someone/nothing', and no plugin of that name on the hub")


def test_a_hub_that_refuses_is_one_line_and_a_public_repository_is_asked_for(directory, tmp_path):
    with StandInHub().running() as server:
        run(server, tmp_path, (str(directory), "someone/mine", True))
        assert server.private == [False]
        refused, _ = run(server, tmp_path, (str(directory), "someone/other", False), token="hf_wrong")
    assert refused.startswith(f"refused: cannot publish '{directory}' as someone/other (")
    assert "\n" not in refused
    assert "someone/other" not in server.files


def test_a_directory_is_taken_as_it_is_and_a_name_is_looked_at_before_the_run(directory, tmp_path, monkeypatch):
    assert hub.plugin_directory(str(directory)) == directory
    assert hub.plugin_directory("a/b/c") == Path("a/b/c")
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    for name in ("mine", "a/b/c", "someone/..", "someone/my--plugin", "someone/mine-", "a/" + "n" * 99):
        with pytest.raises(UserError, match=f"--push={name} is no name on the hub: write org/name"):
            hub.check_push(name, tmp_path)
    with pytest.raises(UserError, match="needs a token"):
        hub.check_push("someone/mine", tmp_path)
