"""Whole runs of LoRA and Adapter on a tiny backbone, in this process."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_run import Spy, files_below, read_metrics
from test_step import SGD

from spa_jax.data.encoding import Encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.models.peft import PEFT_SETTINGS, PeftConfig, init_peft
from spa_jax.training import run
from spa_jax.training.peft_recipe import PeftRecipe
from spa_jax.training.sources import ScoredBatch
from spa_jax.training.step import eval_step, init_state, train_step
from spa_jax.weights.huggingface import load_directory
from spa_jax.weights.peft import load_trained

KEYS = {
    "peft.rank": 6, "peft.alpha": 12.0, "peft.targets": "q,v,down", "peft.width": 8, "train.epochs": 16,
    "train.eval_every": 12, "train.log_every": 3, "optimizer.learning_rate": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def unused_taps(tmp_path_factory):
    return tmp_path_factory.mktemp("unused")


@pytest.fixture(scope="module")
def runs(make_config, unused_taps, tmp_path_factory):
    """setting -> (config, workdir, summary, whether the backbone kept its bytes) of a run of 48 steps."""
    done, load = {}, run.load_backbone
    for setting in PEFT_SETTINGS:
        workdir, seen = tmp_path_factory.mktemp(setting), []

        def loaded(*arguments, seen=seen):
            backbone = load(*arguments)
            seen.append((backbone.params, jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), backbone.params)))
            return backbone

        config = make_config({**KEYS, "setting": setting, "tap_cache.directory": str(unused_taps)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "load_backbone", loaded)
            summary = run.train(config, workdir)
        [(params, before)] = seen
        kept = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), params) == before
        done[setting] = config, workdir, summary, kept
    return done


@pytest.mark.parametrize("setting", PEFT_SETTINGS)
def test_twenty_answers_can_be_learnt(setting, runs, unused_taps):
    _, workdir, summary, kept = runs[setting]
    assert kept
    assert summary["loss/base"] > 5
    assert summary[f"loss/{setting}"] == summary["loss/always"] < 0.3 * summary["loss/base"]
    assert summary["router/usage"] == 1
    assert {"loss/oracle", "params/trainable_percent", "time/train_seconds", "tokens/per_second"} <= set(summary)
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines if f"eval/loss/{setting}" in line] == [12, 24, 36, 48]
    assert {line["eval/loss/base"] for line in lines if "eval/loss/base" in line} == {summary["loss/base"]}
    assert all(f"train/loss/{setting}" in line for line in lines if "train/gradient_norm" in line)
    assert files_below(unused_taps) == []


def test_the_base_loss_is_the_one_a_plugins_run_reports(runs, make_config, tmp_path):
    summary = run.train(make_config({"train.epochs": 1}), tmp_path)
    assert runs["lora"][2]["loss/base"] == pytest.approx(summary["loss/base"], rel=1e-5)


@pytest.mark.parametrize("setting", PEFT_SETTINGS)
def test_a_checkpoint_holds_the_trained_matrices_their_moments_and_counters_alone(setting, runs, tiny_config):
    _, workdir, summary, _ = runs[setting]
    manager = ocp.CheckpointManager(workdir / "checkpoints")
    saved = manager.restore(48, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    manager.close()
    config = load_trained(workdir / "plugin").config
    expected = sorted(leaf.shape for leaf in jax.tree.leaves(init_peft(config, tiny_config, abstract=True)))
    assert sum(np.prod(shape) for shape in expected) == summary["params/trainable"]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(saved["params"])) == expected
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(saved)]
    assert sorted(array.shape for array in arrays if array.ndim) == sorted(3 * expected)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(runs, monkeypatch, tmp_path):
    config, workdir, *_ = runs["lora"]
    with monkeypatch.context() as patch:
        Spy(patch, interrupt_at=29)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, tmp_path)
    run.train(config, tmp_path)
    name = "plugin/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes()
    assert read_metrics(tmp_path) == read_metrics(workdir)


@pytest.mark.parametrize("setting", PEFT_SETTINGS)
def test_what_was_trained_gives_the_answers_it_was_taught(setting, runs, tiny_backbone_directory):
    backbone = load_directory(tiny_backbone_directory)
    plugin = load_trained(runs[setting][1] / "plugin")
    encoder = Encoder(backbone.tokenizer, plugin.template, 128)
    prompts = [encoder.prompt(f"What is thing {i}?") for i in range(20)]
    generations = FusedModel(backbone, plugin).generate(prompts, 8)
    assert {generation.consulted_share for generation in generations} == {1.0}
    said = [backbone.tokenizer.decode(generation.tokens) for generation in generations]
    assert sum(text in ("red</s>", "a cat</s>", "no</s>", "my dog</s>") for text in said) > 14, said
    base = FusedModel(backbone, plugin, "base").generate(prompts, 8)
    assert [g.tokens for g in base] == [g.tokens for g in FusedModel(backbone, None).generate(prompts, 8)]


def test_the_parts_of_a_batch_and_evaluation_agree_with_the_whole(world):
    config, rng = PeftConfig("adapter", 3), np.random.default_rng(5)
    shapes = init_peft(config, world.model.config, abstract=True)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.15 * rng.standard_normal(leaf.shape))), shapes)
    recipe, scored = PeftRecipe(config), ScoredBatch(world.batch, np.zeros_like(world.batch.weights))
    outcomes, weights = eval_step(recipe, world.model, params, world.frozen, scored, 0.5)
    losses = float(jnp.sum(outcomes.consulted * weights))
    found = []
    for accumulate in (1, 4):
        state = init_state(jax.tree.map(jnp.copy, params), SGD)
        state, sums = train_step(recipe, world.model, SGD, accumulate, state, world.frozen, world.batch)
        assert float(sums["consulted"]) == pytest.approx(losses, rel=1e-5)
        found.append(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found[0], params)
    assert min(jax.tree.leaves(moved)) > 1e-4
