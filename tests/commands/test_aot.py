"""The aot command: a report as JSON, and an exit status that says whether it fits."""

import json

import pytest

KEYS = {"fits", "peak_bytes_per_chip", "chip_bytes", "flops_per_chip", "collective_bytes_per_chip", "compile_seconds"}


@pytest.fixture(scope="module")
def aot(command, tiny_backbone_directory, tmp_path_factory):
    def run(*arguments):
        output = tmp_path_factory.mktemp("aot") / "report.json"
        config = ["--config=configs/default.py", f"--config.backbone={tiny_backbone_directory}"]
        size = ["--length=32", "--config.side.taps=all"]
        result = command("spa_jax.aot", *config, *size, f"--output={output}", *arguments)
        return result, json.loads(output.read_text()) if output.exists() else None

    return run


def test_what_fits_is_reported_with_status_0(aot):
    result, report = aot("--program=device", "--rows=2")
    assert result.status == 0, result.err
    assert report.keys() > KEYS
    assert report["fits"]
    assert 0 < report["peak_bytes_per_chip"] < report["chip_bytes"]
    assert report["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert report["collective_bytes_per_chip"] == 0
    assert report["flops_per_chip"] == sum(program["cost"]["flops"] for program in report["programs"]) > 0
    assert "correct" in result.out
    assert "fits" in result.out


def test_what_does_not_fit_ends_with_status_1(aot):
    result, report = aot("--rows=8000000", "--config.train.batch_size=8", "--config.tap_cache.enabled=False")
    assert result.status == 1, result.err
    assert not report["fits"]
    assert report["peak_bytes_per_chip"] > report["chip_bytes"]
    assert "does not fit" in result.out


def test_a_topology_that_is_not_there_is_refused(aot):
    result, _ = aot("--topology=v9:2x2")
    result.assert_refused("there is no topology 'v9:2x2'")
