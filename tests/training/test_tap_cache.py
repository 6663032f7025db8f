"""The tap cache under damage, interruption and company; its features here are random numbers, no backbone runs."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from spa_jax.data.encoding import Example
from spa_jax.errors import UserError
from spa_jax.training import tap_cache
from spa_jax.training.features import Features
from spa_jax.training.tap_cache import FeatureSpec, TapCache

SPEC = FeatureSpec("fingerprint", (1, 3), 8, "float32")
SHARD = 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(tap_cache, "SHARD_EXAMPLES", SHARD)


def example(number: int) -> Example:
    """Row `number` of a data set: 10 tokens of which 1 to 8 are targets."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, 99, 10).astype(np.int32)
    count = 1 + number % 8
    return Example(tokens, np.arange(9 - count, 9, dtype=np.int32), rng.integers(0, 99, count).astype(np.int32))


EXAMPLES = [example(number) for number in range(10)]


def features(chosen: Example, spec: FeatureSpec = SPEC) -> Features:
    """Invents the features that a backbone might give of an example, padded to eight targets."""
    rng = np.random.default_rng(int(chosen.digest, 16) % 2**32)
    hidden, taps, base_loss = (3 * rng.standard_normal(shape).astype(dtype) for shape, dtype in spec.shapes(8, 8))
    integers = np.zeros(8, np.int32)
    return Features(hidden, taps, base_loss.astype(np.float32), integers, np.zeros(8, np.float32), integers, integers)


class Backbone:
    """Counts what it computes; stands still where told to."""

    def __init__(self, spec=SPEC, at=None, then=None):
        self.spec, self.at, self.then = spec, at, then
        self.computed = []

    def __call__(self, examples):
        for index, chosen in enumerate(examples):
            if len(self.computed) == self.at:
                self.then()
            self.computed.append(chosen.digest)
            yield index, features(chosen, self.spec)


def build(root, examples=EXAMPLES, spec=SPEC):
    """An open cache that holds the examples, and how many of them it had to compute."""
    cache, backbone = TapCache(root, spec), Backbone(spec)
    cache.build(examples, backbone)
    return cache, len(backbone.computed)


def assert_reads(cache, examples=EXAMPLES):
    for chosen in examples:
        whole, count = features(chosen, cache.spec), len(chosen.predict)
        expected = (whole.states[:count], whole.taps[:, :count], whole.base_loss[:count])
        for a, b in zip(cache.read(chosen), expected, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def shards(cache):
    return sorted(cache.directory.glob("*.arrayrecord"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_gives_back_what_was_computed_and_computes_it_once(dtype, tmp_path):
    spec = dataclasses.replace(SPEC, dtype=dtype)
    cache, computed = build(tmp_path, EXAMPLES + EXAMPLES[:3], spec)
    assert computed == len(EXAMPLES)
    assert cache.read(EXAMPLES[0])[0].dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    assert_reads(cache)
    again, computed = build(tmp_path, EXAMPLES, spec)
    assert computed == 0
    assert_reads(again)


def test_a_batch_is_padded_to_its_shape_with_rows_and_positions_of_no_weight(tmp_path):
    cache, _ = build(tmp_path)
    batch = cache.collate(EXAMPLES, np.array([2, 7, -1], np.int32))
    assert batch.taps.shape == (3, 2, 8, 8)
    np.testing.assert_array_equal(batch.weights.sum(1), [3, 8, 0])
    for leaf in batch[:5]:  # where the taps stand is as in any batch
        assert not np.any(leaf[2])
        assert not np.any(np.moveaxis(leaf, -1 if leaf.ndim == 2 else -2, 0)[3:, 0])
    np.testing.assert_array_equal(batch.states[0, :3], features(EXAMPLES[2]).states[:3])
    np.testing.assert_array_equal(batch.taps[1], features(EXAMPLES[7]).taps)
    np.testing.assert_array_equal(batch.base_loss[0, :3], features(EXAMPLES[2]).base_loss[:3])
    np.testing.assert_array_equal(batch.targets[0, :3], EXAMPLES[2].targets)


def test_a_larger_data_set_computes_only_what_is_new(tmp_path):
    build(tmp_path, EXAMPLES[:6])
    cache, computed = build(tmp_path, EXAMPLES[::-1])
    assert computed == 4
    assert_reads(cache)


@pytest.mark.parametrize(
    "other", [{"identity": "another"}, {"taps": (1, 2)}, {"taps": (1,)}, {"hidden_size": 4}, {"dtype": "bfloat16"}]
)
def test_another_backbone_tap_list_or_dtype_never_shares(other, tmp_path):
    build(tmp_path)
    spec = dataclasses.replace(SPEC, **other)
    assert len(TapCache(tmp_path, spec).missing(EXAMPLES)) == len(EXAMPLES)
    cache, _ = build(tmp_path, EXAMPLES, spec)
    assert_reads(cache)
    assert build(tmp_path)[1] == 0


def test_the_same_tokens_with_other_targets_are_another_example(tmp_path):
    cache, _ = build(tmp_path)
    one = EXAMPLES[3]
    assert len(cache.missing([one._replace(targets=one.targets + 1), one._replace(predict=one.predict + 1), one])) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"no ArrayRecord at all " * 100),
    ],
    ids=["empty", "half", "a little short", "foreign"],
)
def test_a_shard_that_is_not_whole_is_rebuilt(damage, tmp_path):
    cache, _ = build(tmp_path)
    damage(shards(cache)[0])
    lost = len(TapCache(tmp_path, SPEC).missing(EXAMPLES))
    assert 0 < lost <= SHARD
    cache, computed = build(tmp_path)
    assert computed == lost
    assert_reads(cache)


def test_files_that_are_no_shards_are_left_alone(tmp_path):
    cache, _ = build(tmp_path)
    (cache.directory / "notes.txt").write_text("mine")
    (cache.directory / "folder.arrayrecord").mkdir()
    assert build(tmp_path)[1] == 0
    assert (cache.directory / "notes.txt").read_text() == "mine"


def test_flipped_bits_are_noticed_wherever_they_matter(tmp_path):
    cache, _ = build(tmp_path)
    shard = shards(cache)[0]
    good = shard.read_bytes()
    # The file is padded in blocks of 64 KiB, and these few examples fill little of the first.
    end = max(position for position in range(30_000) if good[position]) + 1
    refused, rebuilt = [], 0
    for position in [*range(70, end, 53), *range(65_536, 65_600, 7)]:
        shard.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        cache = TapCache(tmp_path, SPEC)
        if cache.missing(EXAMPLES):
            rebuilt += 1
            continue
        try:
            assert_reads(cache)
        except UserError as error:
            refused.append(str(error))
    assert rebuilt > 5
    assert len(refused) > 5
    assert all(f"'{shard}' is damaged: delete it and run again" in message for message in refused)
    shard.unlink(missing_ok=True)
    assert_reads(build(tmp_path)[0])


def test_an_interrupted_build_loses_less_than_a_shard(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TapCache(tmp_path, SPEC).build(EXAMPLES, Backbone(at=7, then=interrupt))
    cache, computed = build(tmp_path)
    assert computed == len(EXAMPLES) - SHARD
    assert_reads(cache)


def test_a_killed_build_goes_on_where_it_stopped(tmp_path):
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_tap_cache as t
        t.tap_cache.SHARD_EXAMPLES = t.SHARD
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        t.TapCache(t.tap_cache.Path({str(tmp_path)!r}), t.SPEC).build(t.EXAMPLES, t.Backbone(at=9, then=kill))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    cache, computed = build(tmp_path)
    assert computed == len(EXAMPLES) - 2 * SHARD
    assert_reads(cache)


def test_two_writers_at_once_cost_only_work(tmp_path):
    one, other = TapCache(tmp_path, SPEC), TapCache(tmp_path, SPEC)
    second = Backbone()
    one.build(EXAMPLES, Backbone(at=6, then=lambda: other.build(EXAMPLES[:8], second)))
    assert len(second.computed) == 8
    for cache in (one, TapCache(tmp_path, SPEC)):
        assert_reads(cache)
    assert_reads(other, EXAMPLES[:8])


def test_a_build_beyond_the_limit_is_refused_with_its_size_and_the_ways_out(tmp_path):
    cache = TapCache(tmp_path, SPEC)
    need = sum(SPEC.bytes(chosen) for chosen in EXAMPLES)
    assert need == sum(4 * (8 + 2 * 8 + 1) * len(chosen.predict) for chosen in EXAMPLES)
    cache.check_room(EXAMPLES, need / 2**30)
    with pytest.raises(UserError) as refused:
        cache.check_room(EXAMPLES, (need - 1) / 2**30)
    for word in ("GiB", str(cache.directory), "side.taps", "tap_cache.directory", "tap_cache.enabled=false"):
        assert word in str(refused.value)
    cache.build(EXAMPLES, Backbone())
    cache.check_room(EXAMPLES, 1e-9)


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    monkeypatch.setattr(tap_cache.shutil, "disk_usage", lambda path: tap_cache.shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"free on disk 0\.0 GiB"):
        TapCache(tmp_path, SPEC).check_room(EXAMPLES, 1.0)


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the tap cache"):
        TapCache(tmp_path / "file", SPEC)
