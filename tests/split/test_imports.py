"""Modules loaded by a process with one half of the split: the cloud no side network, the device no backbone's tools."""

import json
import subprocess
import sys

import pytest

MODELS = {f"spa_jax.models.{name}" for name in ("side", "plugin", "peft", "pruning")}
FORBIDDEN = {
    "spa_jax.split.server": (
        MODELS | {"spa_jax.weights.plugin", "spa_jax.weights.peft", "spa_jax.split.device"},
        ("spa_jax.training", "spa_jax.scoring", "spa_jax.decoding.fused"),
    ),
    "spa_jax.split.client": (
        {"spa_jax.split.session", "spa_jax.split.server", "spa_jax.weights.registry"},
        ("spa_jax.training", "spa_jax.scoring", "spa_jax.engine", "spa_jax.decoding.fused", "spa_jax.data.encoding",
         "transformers", "tokenizers", "grain", "prometheus_client"),
    ),
}  # fmt: skip
"""Entry point -> modules, and the beginnings of modules, that it must not load."""
NEEDED = {"spa_jax.split.server": "spa_jax.models.router", "spa_jax.split.client": "spa_jax.models.side"}


@pytest.mark.parametrize("entry", FORBIDDEN)
def test_a_half_loads_nothing_of_the_other(entry):
    script = f"import json, sys, {entry}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    modules, beginnings = FORBIDDEN[entry]
    assert {entry, NEEDED[entry]} <= loaded
    assert not {name for name in loaded if name in modules or name.startswith(beginnings)}
