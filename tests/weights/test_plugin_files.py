"""A plugin to disk and back, and every way it can be no plugin."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin, load_plugin

SIDE = SideConfig("tokenwise", 4, (0, 2, 3))


def make_plugin(setting="spa", seed=0, side=SIDE, entry="head", edits="targets"):
    config = PluginConfig(setting, side, 8, threshold=0.3, entry=entry, edits=edits)
    rng = np.random.default_rng(seed)
    abstract = init_plugin(config, abstract=True)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract)
    return Plugin(config, params, "tiny", "0123", "chat")


@pytest.fixture
def directory(tmp_path):
    make_plugin().save(tmp_path / "plugin")
    return tmp_path / "plugin"


@pytest.mark.parametrize("setting", ["spa", "s1", "s2", "s3"])
def test_what_is_loaded_is_what_was_saved_to_the_bit(setting, tmp_path):
    plugin = make_plugin(setting)
    plugin.save(tmp_path)
    loaded = load_plugin(tmp_path)
    assert dataclasses.replace(loaded, params={}) == dataclasses.replace(plugin, params={})
    assert ("router" in loaded.params) == (setting in ROUTED)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plugin.params)


@pytest.mark.parametrize(("entry", "edits"), [(3, "targets"), (5, "all"), ("head", "targets")])
def test_where_corrections_enter_is_saved(entry, edits, tmp_path):
    make_plugin(entry=entry, edits=edits).save(tmp_path)
    config = load_plugin(tmp_path).config
    assert (config.entry, config.edits) == (entry, edits)


def test_a_plugin_from_before_inner_entries_enters_at_the_head(directory):
    def as_before(description):
        description["format_version"] = 2
        del description["date"]
        del description["config"]["entry"], description["config"]["edits"]

    rewrite(directory, as_before)
    loaded = load_plugin(directory)
    assert loaded.config == make_plugin().config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, make_plugin().params)


def test_the_date_of_its_prompts_is_saved_and_formats_without_one_have_none(directory):
    dataclasses.replace(make_plugin(), date="2025-02-03").save(directory)
    assert load_plugin(directory).date == "2025-02-03"

    def as_before(description):
        description["format_version"] = 3
        del description["date"]

    rewrite(directory, as_before)
    assert load_plugin(directory).date == ""


def test_a_plugin_of_one_tap_can_be_saved(tmp_path):
    plugin = make_plugin(side=dataclasses.replace(SIDE, taps=(3,)))
    plugin.save(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_plugin(tmp_path).params, plugin.params)


def test_saving_replaces_the_plugin_whole(directory):
    (directory / "stray").write_text("")
    make_plugin("s1", seed=1).save(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["plugin.safetensors", "plugin_config.json"]
    assert load_plugin(directory).config.setting == "s1"
    assert [path.name for path in directory.parent.iterdir()] == ["plugin"]


def test_the_backbone_of_another_fingerprint_is_refused_with_both_names(tiny_config):
    plugin, tokenizer = make_plugin(), None
    plugin.check(Backbone("elsewhere", tiny_config, {}, tokenizer, (), "0123"))
    with pytest.raises(UserError, match=r"trained on the backbone 'tiny' \(fingerprint 0123\), not on 'big' .* 4567"):
        plugin.check(Backbone("big", tiny_config, {}, tokenizer, (), "4567"))


def test_an_entry_above_the_backbones_blocks_is_refused(tiny_config):
    plugin = make_plugin(entry=tiny_config.num_layers)
    with pytest.raises(UserError, match=r"enters in front of block 3, and 'tiny' has 3 blocks"):
        plugin.check(Backbone("tiny", tiny_config, {}, None, (), "0123"))


def rewrite(directory, change):
    path = directory / "plugin_config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def reweigh(directory, change):
    path = directory / "plugin.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)


def truncate(directory):
    path = directory / "plugin.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def described(*path, value):
    def change(description):
        for key in path[:-1]:
            description = description[key]
        description[path[-1]] = value

    return lambda directory: rewrite(directory, change)


SPOILED = {
    "no directory": (lambda d: d.rename(d.parent / "gone"), "no plugin at '.*plugin': cannot read plugin_config.json"),
    "no weights": (lambda d: (d / "plugin.safetensors").unlink(), "cannot read '.*plugin.safetensors'"),
    "short weights": (truncate, "cannot read '.*plugin.safetensors'"),
    "no weights at all": (
        lambda d: (d / "plugin.safetensors").write_bytes(b"{}"),
        "cannot read '.*plugin.safetensors'",
    ),
    "no JSON": (lambda d: (d / "plugin_config.json").write_text("{"), "plugin_config.json' is damaged"),
    "no text": (lambda d: (d / "plugin_config.json").write_bytes(b"\xff\xfe"), "plugin_config.json' is damaged"),
    "no object": (lambda d: (d / "plugin_config.json").write_text("[]"), "has plugin format None"),
    "deep": (lambda d: (d / "plugin_config.json").write_text("[" * 100_000), "is damaged: it is nested too deeply"),
    "wide": (
        described("config", "side", "width", value=10**400),
        "side.width must be at least 1 and at most 2147483647",
    ),
    "large": (described("config", "hidden_size", value=2**31), "hidden_size must be at least 1 and at most"),
    "format": (described("format_version", value=1), "has plugin format 1, this spa_jax reads format 2 and 3"),
    "no entry": (lambda d: rewrite(d, lambda j: j["config"].pop("entry")), "plugin_config.json' is damaged"),
    "entry": (described("config", "entry", value="tail"), "plugin_config.json' is damaged"),
    "entry below the first": (described("config", "entry", value=-1), "plugin_config.json' is damaged"),
    "entry type": (described("config", "entry", value=True), "plugin_config.json' is damaged"),
    "taps above the entry": (described("config", "entry", value=2), "plugin_config.json' is damaged"),
    "edits": (described("config", "edits", value="some"), "plugin_config.json' is damaged"),
    "all at the head": (described("config", "edits", value="all"), "plugin_config.json' is damaged"),
    "extra key": (described("config", "side", "depth", value=2), "plugin_config.json' is damaged"),
    "lost key": (lambda d: rewrite(d, lambda j: j["config"].pop("threshold")), "plugin_config.json' is damaged"),
    "setting": (described("config", "setting", value="s9"), "plugin_config.json' is damaged"),
    "kind": (described("config", "side", "kind", value="mamba"), "plugin_config.json' is damaged"),
    "no width": (described("config", "side", "width", value=0), "side.width must be at least 1"),
    "no heads": (described("config", "side", "heads", value=-1), "side.heads must be at least 1"),
    "heads": (described("config", "side", "kind", value="transformer"), "each of 4 heads an even width"),
    "tap below the first": (described("config", "side", "taps", value=[-1, 2]), "plugin_config.json' is damaged"),
    "threshold": (described("config", "threshold", value=1.5), "threshold 1.5 does not lie between 0 and 1"),
    "threshold NaN": (described("config", "threshold", value=float("nan")), "threshold nan does not lie between"),
    "NaN": (
        lambda d: reweigh(d, lambda a: a["side.gate"].reshape(-1).__setitem__(0, np.nan)),
        "values of side.gate are NaN or infinite",
    ),
    "date": (lambda d: rewrite(d, lambda j: j.pop("date")), "plugin_config.json' is damaged"),
    "date type": (described("date", value=20240726), "plugin_config.json' is damaged"),
    "width type": (described("config", "side", "width", value="4"), "plugin_config.json' is damaged"),
    "taps type": (described("config", "side", "taps", value=3), "plugin_config.json' is damaged"),
    "no taps": (described("config", "side", "taps", value=[]), "plugin_config.json' is damaged"),
    "threshold type": (described("config", "threshold", value=None), "plugin_config.json' is damaged"),
    "template": (described("template", value="alpaca"), "plugin_config.json' is damaged"),
    "backbone type": (described("backbone", value=None), "plugin_config.json' is damaged"),
    "other width": (described("config", "side", "width", value=5), r"does not fit .* misshapen \['side.adapter_in'"),
    "weight lost": (lambda d: reweigh(d, lambda a: a.pop("router.kernel")), r"does not fit .*\['router.kernel'\]"),
    "weight more": (lambda d: reweigh(d, lambda a: a.update(x=a["side.gate"])), r"does not fit .*\['x'\]"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_no_plugin_is_refused_in_one_line(case, directory):
    spoil, message = SPOILED[case]
    spoil(directory)
    with pytest.raises(UserError, match=message) as refused:
        load_plugin(directory)
    assert "\n" not in str(refused.value)
