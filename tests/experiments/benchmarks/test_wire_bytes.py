"""Losses of what crosses the wire: with nothing lost, that of the plugin itself."""

import pytest

from experiments.benchmarks import wire_bytes
from spa_jax.choices import CODECS


def test_fewer_bytes_lose_little_and_float32_nothing(tiny_store):
    found = wire_bytes.measure(tiny_store, "spa seed 0")
    assert found.keys() == set(CODECS)
    cell = wire_bytes.ablations.cells(tiny_store.scale, "sciq")["spa seed 0"]
    assert found["float32"]["loss"] == pytest.approx(tiny_store.result(cell)["loss/always"], rel=1e-5)
    assert found["int8"]["bytes"] < found["bfloat16"]["bytes"] < found["float32"]["bytes"]
    assert found["int8"]["loss"] == pytest.approx(found["float32"]["loss"], rel=0.05)
