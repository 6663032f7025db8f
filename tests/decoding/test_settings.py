"""A method runs in the settings it has the parts for, with the threshold it is given or has, and to its own end."""

import dataclasses

import pytest

from spa_jax.choices import SETTINGS
from spa_jax.decoding.settings import resolve_setting, stop_tokens
from spa_jax.errors import UserError
from spa_jax.models.peft import PeftConfig
from spa_jax.models.plugin import PluginConfig
from spa_jax.models.side import SideConfig
from spa_jax.weights.registry import load_backbone


def make_method(setting, threshold=0.5):
    return PluginConfig(setting, SideConfig("tokenwise", 6, (0, 2, 3)), 32, threshold)


@pytest.mark.parametrize(
    ("trained", "runs"),
    [("spa", {"spa", "s1", "base"}), ("s1", {"s1", "base"}), ("s2", {"s2", "s3", "base"}), ("s3", {"s3", "base"})],
)
def test_a_plugin_runs_in_the_settings_it_has_the_parts_for(trained, runs):
    assert resolve_setting(make_method(trained), None, None) == (trained, 0.5)
    for setting in SETTINGS:
        if setting in runs:
            assert resolve_setting(make_method(trained), setting, None) == (setting, 0.5)
        else:
            with pytest.raises(UserError, match=f"trained as '{trained}' cannot run as '{setting}'") as refusal:
                resolve_setting(make_method(trained), setting, None)
            assert set(str(refusal.value).split("only as ")[1].split(", ")) == runs


def test_without_a_plugin_only_base_runs():
    assert resolve_setting(None, None, None) == resolve_setting(None, "base", None) == ("base", 0.5)
    with pytest.raises(UserError, match="'spa' needs a plugin"):
        resolve_setting(None, "spa", None)


def test_a_lora_runs_as_itself_or_as_base_and_has_no_threshold_to_set():
    lora = PeftConfig("lora", 3)
    assert resolve_setting(lora, None, 0.7) == ("lora", 0.0)
    assert resolve_setting(lora, "base", None) == ("base", 0.0)
    with pytest.raises(UserError, match="a 'lora' cannot run as 'spa', only as what it is, or as base"):
        resolve_setting(lora, "spa", None)


def test_a_threshold_is_the_one_that_is_given_or_the_plugins_own():
    assert resolve_setting(make_method("spa", 0.9), None, None) == ("spa", 0.9)
    assert resolve_setting(make_method("spa", 0.9), None, 0.0) == ("spa", 0.0)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="threshold is "):
        resolve_setting(make_method("spa"), None, threshold)


def test_a_generation_ends_where_the_checkpoint_says_and_with_a_plugin_where_its_targets_end(tiny_backbone_directory):
    backbone = dataclasses.replace(load_backbone(str(tiny_backbone_directory)), eos_ids=(1,))
    assert [stop_tokens(backbone, template) for template in ("", "plain", "chat")] == [(1,), (1, 256), (1, 256)]
    backbone.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<assistant>{% endfor %}"
    assert [stop_tokens(backbone, template) for template in ("", "plain", "chat")] == [(1,), (1, 256), (1, 258)]
    assert stop_tokens(dataclasses.replace(backbone, eos_ids=()), "chat") == ()
