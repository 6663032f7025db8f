"""Whole runs of a plugin that enters in front of an inner block: the tap cache, interruption."""

import pytest

from spa_jax.training import run
from spa_jax.weights.plugin import load_plugin
from tests.training.test_run import Spy, plugin_bytes, read_metrics

KEYS = {
    "side.entry": "0", "side.edits": "targets", "side.taps": "0", "router.labels": "always", "router.budget": 0.5,
    "train.log_every": 1, "train.eval_every": 3,
}  # fmt: skip
"""Six steps, evaluated after the third and the last."""
TO_STATES = 1e-4
"""GiB for which keys and values are too large, and states are not."""


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    """The directory of a run that keeps keys and values, beside that of its tap cache."""
    root = tmp_path_factory.mktemp("inner")
    run.train(make_config({**KEYS, "tap_cache.directory": str(root / "taps")}), root / "run")
    return root


def close(found, expected, rel):
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(whole, make_config, monkeypatch, tmp_path):
    config = make_config({**KEYS, "tap_cache.directory": str(whole / "taps")})
    with monkeypatch.context() as patch:
        Spy(patch, interrupt_at=4)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, tmp_path)
    run.train(config, tmp_path)
    assert plugin_bytes(tmp_path) == plugin_bytes(whole / "run")
    assert read_metrics(tmp_path) == read_metrics(whole / "run")
    plugin = load_plugin(tmp_path / "plugin").config
    assert (plugin.entry, plugin.edits, plugin.taps) == (0, "targets", (0,))


@pytest.mark.parametrize("kept", ["states", "nothing"])
def test_what_is_kept_changes_no_loss(kept, whole, make_config, tmp_path):
    limit = {"tap_cache.limit_gib": TO_STATES if kept == "states" else 1e-9}
    run.train(make_config({**KEYS, **limit, "tap_cache.directory": str(tmp_path / "taps")}), tmp_path / "run")
    size = {root: sum(f.stat().st_size for f in (root / "taps").rglob("*.arrayrecord")) for root in (tmp_path, whole)}
    assert (0 < size[tmp_path] < size[whole]) if kept == "states" else size[tmp_path] == 0
    curve = read_metrics(tmp_path / "run")
    assert len(curve) == 8
    assert curve[-1]["eval/loss/always"] < curve[0]["train/loss/always"] - 0.1
    assert 0 < curve[-1]["eval/router/usage"] <= 0.5
    close(curve, read_metrics(whole / "run"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenwise", "transformer"])
def test_the_tap_cache_changes_no_loss_where_prompts_are_corrected(kind, make_config, tmp_path):
    keys = {**KEYS, "side.edits": "all", "side.kind": kind, "side.entry": "2", "side.taps": "0,2"}
    curves = []
    for enabled in (True, False):
        taps = {"tap_cache.enabled": enabled, "tap_cache.directory": str(tmp_path / "taps")}
        run.train(make_config({**keys, **taps}), tmp_path / str(enabled))
        curves.append(read_metrics(tmp_path / str(enabled)))
    assert list((tmp_path / "taps").rglob("*.arrayrecord"))
    assert curves[0][-1]["eval/loss/always"] < curves[0][0]["train/loss/always"] - 0.1
    close(*curves, 1e-4)


def test_keys_in_half_precision_have_a_cache_of_their_own_and_change_losses_little(whole, make_config, tmp_path):
    options = {"tap_cache.directory": str(whole / "taps"), "tap_cache.dtype": "bfloat16"}
    before = set((whole / "taps").iterdir())
    run.train(make_config({**KEYS, **options}), tmp_path)
    assert len(before) == 1
    assert len(set((whole / "taps").iterdir()) - before) == 1
    names = ("eval/loss/always", "eval/loss/spa")
    half, full = read_metrics(tmp_path)[-1], read_metrics(whole / "run")[-1]
    assert half["eval/loss/base"] == full["eval/loss/base"]
    for name in names:
        assert half[name] == pytest.approx(full[name], rel=0.02)
        assert half[name] != full[name]
