"""Saving and restoring states of a few numbers."""

import contextlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spa_jax.errors import UserError
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.step import TrainState, init_state

TX = optax.adam(0.1)


def state(step: int, width: int = 3) -> TrainState:
    params = {"side": {"down": jnp.arange(width, dtype=jnp.float32) / 7 + step}, "router": {"kernel": jnp.ones((2, 2))}}
    return init_state(params, TX)._replace(step=jnp.int32(step))


def opened(directory):
    return contextlib.closing(Checkpoints(directory, "loss/spa"))


@pytest.fixture
def directory(tmp_path):
    """Checkpoints of steps 1 to 4, the second of which is the best."""
    with opened(tmp_path / "checkpoints") as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
            checkpoints.save(state(step), 0, {"loss/spa": loss})
    return tmp_path / "checkpoints"


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_there_is_nothing_to_restore_in_a_new_run(tmp_path):
    with opened(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(state(0)) is None
        assert checkpoints.restore(state(0), best=True) is None


def test_the_last_and_the_best_state_are_kept_and_come_back_to_the_bit(directory):
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4"]
    with opened(directory) as checkpoints:
        assert_same(checkpoints.restore(state(0)), state(4))
        assert_same(checkpoints.restore(state(0), best=True), state(2))


def test_a_plugin_of_one_tap_can_be_saved(tmp_path):
    shapes = init_plugin(PluginConfig("spa", SideConfig("tokenwise", 4, (3,)), 8), abstract=True)
    one = init_state(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes), TX)
    with opened(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(one, 0, {"loss/spa": 1.0})
        assert_same(checkpoints.restore(one), one)


def test_saving_a_step_again_changes_nothing(directory):
    with opened(directory) as checkpoints:
        checkpoints.save(state(4)._replace(params=state(9).params), 0, {"loss/spa": 0.0})
        assert_same(checkpoints.restore(state(0)), state(4))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    change = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)
    with opened(tmp_path / "checkpoints") as checkpoints:
        saved = state(1, width=1_000_000)
        checkpoints.save(saved, 0, {"loss/spa": 1.0})
        jax.block_until_ready(change(saved))
        assert_same(checkpoints.restore(state(0, width=1_000_000)), state(1, width=1_000_000))


def test_ctrl_c_is_held_back_until_a_save_is_through(tmp_path, monkeypatch):
    with opened(tmp_path / "checkpoints") as checkpoints:
        save, through = checkpoints._manager.save, []

        def interrupted(*arguments, **keywords):
            signal.raise_signal(signal.SIGINT)
            through.append(save(*arguments, **keywords))

        monkeypatch.setattr(checkpoints._manager, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(state(1), 0, {"loss/spa": 1.0})
        assert through == [True]
        assert_same(checkpoints.restore(state(0)), state(1))


def test_what_a_killed_save_left_is_no_checkpoint(directory):
    (directory / "5.orbax-checkpoint-tmp").mkdir()
    with opened(directory) as checkpoints:
        assert_same(checkpoints.restore(state(0)), state(4))


@pytest.mark.parametrize("part", ["state", "metrics", "."])
def test_a_damaged_checkpoint_is_named_in_one_line(part, directory):
    for path in (directory / "4" / part).rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * 10)
    with pytest.raises(UserError) as refused, opened(directory) as checkpoints:
        checkpoints.restore(state(0))
    assert str(directory) in str(refused.value)
    assert "choose another --workdir" in str(refused.value)
    assert "\n" not in str(refused.value)
