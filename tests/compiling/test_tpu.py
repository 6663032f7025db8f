"""Programs that the TPU compiler makes of LLaMA for chips that are not here. `SPA_JAX_TPU_PYTHON` names the Python of
an environment that has it."""

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
GIB = 2**30
HEAD = "--config.side.entry=head"
WITHOUT_CACHE = "--config.tap_cache.enabled=False"


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory):
    python = os.environ.get("SPA_JAX_TPU_PYTHON")
    if not python:
        pytest.skip("SPA_JAX_TPU_PYTHON names no Python with the TPU compiler")

    @functools.cache
    def compile_one(topology, *arguments, backbone="llama-7b"):
        output = tmp_path_factory.mktemp("aot") / "report.json"
        config = [f"--config=configs/paper/coqa.py:{backbone}", f"--topology={topology}", f"--output={output}"]
        command = [python, "-m", "spa_jax.aot", *config, *arguments]
        quick = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")  # of the tests; here the program of users is judged
        environment = {name: value for name, value in os.environ.items() if name not in quick}
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr[-4000:]
        return done.returncode, json.loads(output.read_text())

    return compile_one


def test_training_llama_7b_fits_eight_small_chips(compile_for):
    status, report = compile_for("v5e:2x4", WITHOUT_CACHE, HEAD)
    (step,) = report["programs"]
    assert status == 0
    assert report["fits"]
    assert report["chips"] == 8
    assert step["argument_bytes"] < 1.75 * GIB
    assert step["temporary_bytes"] < 1.1 * GIB
    forward = 2 * 6.6e9 * 1024  # of a chip's row, all parameters but the embedding
    assert forward < report["flops_per_chip"] < 1.15 * forward
    assert step["cost"]["unknown_loops"] == 0
    largest = max(step["cost"]["largest_outside"].values())
    assert largest <= 32000 * 4096 * 2  # the LM head; a backbone is 50 times that


def test_corrections_in_the_middle_of_llama_7b_fit_eight_small_chips(compile_for):
    """A row goes once through the blocks below the entry and five times through those above: for the base, corrected
    everywhere forward and back, and for both choices under the router's own pattern."""
    status, report = compile_for("v5e:2x4", WITHOUT_CACHE)
    (step,) = report["programs"]
    assert status == 0
    assert step["temporary_bytes"] < 3.2 * GIB
    forward = 2 * 6.6e9 * 1024
    lower, upper = 15 / 32, 17 / 32
    assert (lower + 4.5 * upper) * forward < report["flops_per_chip"] < (lower + 5.5 * upper) * forward
    assert step["cost"]["unknown_loops"] == 0


@pytest.mark.parametrize(
    ("backbone", "topology", "mesh"),
    [("llama-13b", "v5e:4x4", (1, 8, 2)), ("llama-2-70b", "v5p:4x4x4", (1, 8, 8))],
)
def test_larger_backbones_fit_more_chips(backbone, topology, mesh, compile_for):
    """By the mesh that a config has by itself: one copy over all chips, and no more parts of the batch than rows."""
    status, report = compile_for(topology, WITHOUT_CACHE, backbone=backbone)
    assert status == 0, report
    assert tuple(report["mesh"].values()) == mesh
    assert report["peak_bytes_per_chip"] < report["chip_bytes"]


def test_lora_takes_more_of_a_chip_than_a_plugin(compile_for):
    _, spa = compile_for("v5e:2x4", WITHOUT_CACHE, HEAD)
    _, lora = compile_for("v5e:2x4", "--config.setting=lora")
    assert lora["fits"]
    assert lora["programs"][0]["temporary_bytes"] > spa["programs"][0]["temporary_bytes"]
    assert 2 * spa["flops_per_chip"] < lora["flops_per_chip"] < 4 * spa["flops_per_chip"]


def test_one_small_chip_is_too_small_for_llama_13b(compile_for):
    status, report = compile_for("v5e:1x1", WITHOUT_CACHE, backbone="llama-13b")
    assert status == 1
    assert not report["fits"]


@pytest.mark.parametrize("rows", [1, 8])
def test_the_cloud_half_of_llama_7b_fits_four_small_chips(rows, compile_for):
    """A step reads each weight and each slot in view once, and copies none of them."""
    mesh = ("--config.mesh.fsdp=1", "--config.mesh.tensor=4")
    status, report = compile_for("v5e:2x2", "--program=cloud", HEAD, *mesh, f"--rows={rows}", "--length=896")
    part, step = report["programs"]
    assert status == 0
    assert [part["name"], step["name"]] == ["64 tokens of a prompt", "step"]
    weights, cache = 2 * 6.74e9 / 4, 2 * 2 * 32 * rows * 1024 * 4096 / 4
    assert weights < report["peak_bytes_per_chip"] < report["chip_bytes"]
    assert weights + cache < step["argument_bytes"] < 1.02 * (weights + cache)
    assert 0.9 * (weights + cache) < step["cost"]["bytes"] < 1.2 * (weights + cache)
    assert step["temporary_bytes"] < 0.01 * weights


def test_the_cloud_half_of_llama_7b_in_8_bits_fits_one_small_chip(compile_for):
    """It reads each matrix once a token, as int8: no floats are written, and neither weights nor cache are copied. The
    prompt's program has no use for the LM head."""
    status, report = compile_for(
        "v5e:1x1", "--program=cloud", HEAD, "--config.compute.weights=int8", "--rows=8", "--length=896"
    )
    assert status == 0
    part, step = report["programs"]
    weights, head, cache = 6.74e9, 32000 * 4096, 2 * 2 * 32 * 8 * 1024 * 4096
    assert weights - head < part["argument_bytes"] - cache < 1.01 * (weights - head)
    assert weights < step["argument_bytes"] - cache < 1.01 * weights
    assert part["temporary_bytes"] < 0.1 * cache
    assert step["temporary_bytes"] < 0.01 * cache
    assert step["peak_bytes"] < report["chip_bytes"]
    assert 0.9 * (weights + cache) < step["cost"]["bytes"] < 1.2 * (weights + cache)


def test_prompts_that_are_corrected_go_through_every_block_once(compile_for):
    inner = ("--config.side.entry=16", "--config.side.edits=all")
    status, report = compile_for(
        "v5e:1x1", "--program=cloud", "--rows=8", "--length=256", *inner, backbone="smollm2-135m-instruct"
    )
    assert status == 0
    assert [program["cost"]["unknown_loops"] for program in report["programs"]] == [0, 0, 1]
    blocks, attention = 2 * 64 * 106.2e6, 30 * 2 * 2 * 64 * 512 * 576  # of which 512 slots are in view
    found = sum(program["cost"]["flops"] for program in report["programs"][:2])
    assert found == pytest.approx(blocks + attention, rel=0.01)
    assert 2 * 8 * 134e6 < report["programs"][2]["cost"]["flops"] < 1.2 * 2 * 8 * 134e6


def test_splash_attention_keeps_no_scores(compile_for):
    """Neither forward nor, in LoRA, backward."""
    for arguments in ((WITHOUT_CACHE,), ("--config.setting=lora",)):
        _, fused = compile_for("v5e:2x4", *arguments)
        _, whole = compile_for("v5e:2x4", *arguments, "--config.compute.attention=xla")
        scores = 32 * 1024 * 1024 * 2  # of a chip's row, in bfloat16
        saved = whole["programs"][0]["temporary_bytes"] - fused["programs"][0]["temporary_bytes"]
        assert saved > scores


def test_two_slices_are_compiled_as_one_mesh(compile_for):
    status, report = compile_for("v5e:2x4", WITHOUT_CACHE, "--config.mesh.slices=2", "--config.train.batch_size=16")
    assert status == 0
    assert report["chips"] == 16
    assert tuple(report["mesh"].values()) == (2, 8, 1)
