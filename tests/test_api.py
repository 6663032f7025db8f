"""The public names: they load lazily, and the examples in their docstrings run on a tiny random backbone."""

import doctest
import inspect
import json
import subprocess
import sys

import pytest

import spa_jax
from spa_jax.errors import UserError
from spa_jax.training.config import RunConfig, with_defaults

SCIENCE = {"question": "What do cows eat?", "correct_answer": "grass", "support": "Cows graze."}

WITHOUT_EXAMPLE = {"GeneratedText", "UserError"}
"""Public classes that users do not make themselves: one is returned by `generate_text`, the other is raised."""


@pytest.fixture(scope="module")
def examples_directory(tmp_path_factory, tiny_backbone_directory, rows_file, tap_directory):
    """A directory where the files that the examples name are tiny ones."""
    directory = tmp_path_factory.mktemp("examples")
    (directory / "smollm2-135m-instruct").symlink_to(tiny_backbone_directory)
    (directory / "mine.jsonl").symlink_to(rows_file)
    (directory / "sciq").mkdir()
    for split in ("train", "validation", "test"):
        (directory / "sciq" / f"{split}.jsonl").write_text(3 * (json.dumps(SCIENCE) + "\n"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("SPA_JAX_CACHE", str(tap_directory))
        yield directory


@pytest.fixture(scope="module")
def trained(examples_directory):
    """The run that the examples of loading, evaluating and generating go on from."""
    spa_jax.train_plugin({"data.train": "mine.jsonl", "train.epochs": 2}, "runs/mine")


def run_examples(subject, name):
    tests = doctest.DocTestFinder(recurse=False).find(subject, name, module=inspect.getmodule(subject))
    runner = doctest.DocTestRunner(verbose=False)
    output = []
    assert sum(runner.run(test, out=output.append).attempted for test in tests)
    assert not runner.failures, "".join(output)


def test_the_examples_of_the_package_run(trained):
    run_examples(spa_jax, "spa_jax")


@pytest.mark.parametrize("name", [name for name in spa_jax.__all__ if name not in WITHOUT_EXAMPLE])
def test_the_examples_of_a_public_name_run(name, trained):
    run_examples(getattr(spa_jax, name), name)


def test_importing_the_package_loads_neither_jax_nor_flax():
    program = "import sys, spa_jax; dir(spa_jax); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "spa_jax" in loaded
    assert not {"jax", "flax", "numpy", "transformers"} & set(loaded)


def test_every_public_name_is_listed_and_is_there():
    assert set(spa_jax.__all__) <= set(dir(spa_jax))
    assert all(callable(getattr(spa_jax, name)) for name in spa_jax.__all__)


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'train_pluggin'"):
        spa_jax.train_pluggin  # noqa: B018


def test_keys_are_set_by_dots_and_by_nesting_and_the_defaults_stay():
    dotted = with_defaults({"train.epochs": 3, "side.width": 8})
    nested = with_defaults({"train": {"epochs": 3}, "side": {"width": 8}})
    assert dotted == nested
    assert (dotted.train.epochs, dotted.train.batch_size) == (3, RunConfig().train.batch_size)
    assert with_defaults({}).train.epochs == RunConfig().train.epochs != 3


@pytest.mark.parametrize("key", ["train.epoch", "trian.epochs", "seed.width", "bakbone"])
def test_an_unknown_key_is_refused_by_name(key):
    with pytest.raises(UserError, match=f"unknown config key {key.split('.')[0]}"):
        with_defaults({key: 3})


def test_an_empty_prompt_is_refused(tiny_backbone_directory):
    backbone = spa_jax.load_backbone(str(tiny_backbone_directory))
    with pytest.raises(UserError, match="the prompt is empty"):
        spa_jax.generate_text(backbone, None, "  ")
