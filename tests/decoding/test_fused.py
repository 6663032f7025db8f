"""Generation in one process, against a loop that reruns the whole uncached forward for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spa_jax.choices import SETTINGS
from spa_jax.decoding import fused_programs
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.models.block import PADDING
from spa_jax.models.llama import Llama
from spa_jax.models.plugin import PluginConfig, correction, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin

EOS = (51, 96)
"""51 is what `spa` says in the midst of its answer to the third prompt, and to no other."""
CONTEXT, NEW, TAPS = 64, 14, (0, 2, 3)
PROMPTS = [np.random.default_rng(seed).integers(0, 96, length).tolist() for seed, length in enumerate((3, 11, 6, 20))]
TRAINED_AS = {"spa": "spa", "s1": "spa", "s2": "s2", "s3": "s2", "base": "spa"}
"""Each setting runs a plugin that can also run another one."""


@pytest.fixture(scope="module")
def backbone(tiny_config, tiny_params):
    vocabulary = {f"w{i}": i for i in range(96)} | {"</s>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    config = dataclasses.replace(tiny_config, max_position_embeddings=CONTEXT)
    return Backbone("tiny", config, tiny_params, fast, EOS, "f" * 32)


def make_plugin(setting, threshold=0.5, kind="tokenwise", offset=False):
    """A plugin with random parameters, as loud as f, and a router that is of two minds."""
    side = SideConfig("tokenwise", 6, TAPS) if kind == "tokenwise" else SideConfig("transformer", 8, TAPS, heads=2)
    config = PluginConfig(setting, side, 32, threshold, offset)
    rng = np.random.default_rng(4)
    shapes = init_plugin(config, abstract=True)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.4 * rng.standard_normal(leaf.shape))), shapes)
    return Plugin(config, params, "tiny", "f" * 32, "plain")


@pytest.fixture(scope="module")
def fused(backbone):
    """setting -> its model."""
    return lambda setting: FusedModel(backbone, make_plugin(TRAINED_AS[setting]), setting)


@pytest.fixture(scope="module")
def rerun(backbone):
    """(setting, prompt, threshold, kind) -> greedy tokens, where the device was asked, the least margin of the best."""
    model, frozen, width = Llama(backbone.config, TAPS), backbone.params, 40

    @jax.jit
    def forward(tokens, positions):
        out = model.apply({"params": frozen}, tokens, positions)
        return out.hidden[0], out.taps[:, 0]

    side = jax.jit(correction, static_argnums=0)
    scales = np.concatenate([frozen["blocks"]["attention_norm"]["scale"], frozen["norm"]["scale"][None]])
    lm_head = np.asarray(frozen["lm_head"]["kernel"])

    def run(setting, prompt, threshold=0.5, kind="tokenwise", offset=False):
        plugin = make_plugin(TRAINED_AS[setting], kind=kind, offset=offset)
        constant = np.asarray(plugin.params["router"]["offset"]) if offset else 0
        text, new, asked, margins = list(prompt), [], [], []
        while len(new) < NEW and not set(new) & set(EOS):
            padding = width - len(text)
            positions = np.array([[*range(len(text)), *[PADDING] * padding]], np.int32)
            hidden, taps = forward(np.array([[*text, *[0] * padding]], np.int32), positions)
            f, raw = np.asarray(hidden[len(text) - 1]), np.asarray(taps)
            rms = np.sqrt(np.mean(raw**2, axis=-1, keepdims=True) + backbone.config.rms_norm_eps)
            normalized = jnp.asarray(raw / rms * scales[list(TAPS)][:, None])
            g = np.asarray(side(plugin.config, plugin.params, normalized[:, None], positions)[0])[0, len(text) - 1]
            scores = f @ np.asarray(plugin.params["router"]["kernel"])
            p = np.exp(scores[1]) / np.exp(scores).sum()
            sigma = {"spa": p > threshold, "s2": p > threshold, "s1": True, "s3": True, "base": False}[setting]
            state = {"spa": f + sigma * g, "s1": f + g, "s2": g if sigma else f, "s3": g, "base": f}[setting]
            state = state if sigma or setting == "base" else state + constant
            logits = state @ lm_head
            best = np.sort(logits)[-2:]
            new.append(int(logits.argmax()))
            asked.append(bool(sigma))
            margins.append(best[1] - best[0])
            text.append(new[-1])
        return new, asked, min(margins)

    return run


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_equals_rerunning_the_whole_forward_for_every_token(setting, fused, rerun):
    generations = fused(setting).generate(PROMPTS, NEW)
    for prompt, generation in zip(PROMPTS, generations):
        tokens, asked, margin = rerun(setting, prompt)
        assert margin > 1e-4, "float noise could decide this case: choose another seed"
        assert generation.tokens == tokens
        assert generation.consulted == asked
    asked = [share for generation in generations for share in generation.consulted]
    assert any(asked) == (setting != "base")
    assert all(asked) == (setting in ("s1", "s3"))


def test_the_routers_offset_is_added_where_the_device_is_not_asked(backbone, rerun):
    generations = FusedModel(backbone, make_plugin("spa", offset=True)).generate(PROMPTS, NEW)
    expected = [rerun("spa", prompt, offset=True) for prompt in PROMPTS]
    assert min(margin for *_, margin in expected) > 1e-4
    assert [(g.tokens, g.consulted) for g in generations] == [(tokens, asked) for tokens, asked, _ in expected]
    assert [tokens for tokens, *_ in expected] != [rerun("spa", prompt)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("setting", ["spa", "s3"])
def test_a_side_network_that_attends_equals_rerunning_it_over_the_whole_text(setting, backbone, rerun):
    plugin = make_plugin(TRAINED_AS[setting], kind="transformer")
    generations = FusedModel(backbone, plugin, setting).generate(PROMPTS, NEW)
    for prompt, generation in zip(PROMPTS, generations):
        tokens, asked, margin = rerun(setting, prompt, kind="transformer")
        assert margin > 1e-4, "float noise could decide this case: choose another seed"
        assert generation.tokens == tokens
        assert generation.consulted == asked


def test_settings_say_different_things(fused):
    said = {tuple(fused(setting).generate(PROMPTS, NEW)[1].tokens) for setting in SETTINGS}
    assert len(said) == len(SETTINGS)


def test_a_row_ends_with_its_eos_and_the_others_go_on(fused):
    generations = fused("spa").generate(PROMPTS, NEW)
    lengths = [len(generation.tokens) for generation in generations]
    assert lengths[2] < NEW
    assert generations[2].tokens[-1] in EOS
    assert [*lengths[:2], lengths[3]] == [NEW] * 3
    assert [len(generation.consulted) for generation in generations] == lengths


def test_generation_stops_when_every_row_has_ended(fused):
    model, prompts = fused("s3"), PROMPTS[:2] * 2
    first, second = (len(generation.tokens) for generation in model.generate(prompts, NEW)[:2])
    assert first != second
    state = model.advance(model.start(prompts, NEW, Sampling(), 0), Sampling(), NEW)
    assert int(state.hypotheses.num_generated.max()) == max(first, second) < NEW
    assert state.hypotheses.is_done.tolist() == [True] * 4


def test_a_prompt_in_a_batch_gives_what_it_gives_alone(fused):
    model = fused("spa")
    assert model.generate(PROMPTS, NEW) == [model.generate([prompt], NEW)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("beams", [None, Beams(3)], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["tokenwise", pytest.param("transformer", marks=pytest.mark.slow)])
def test_prompts_that_begin_another_one_are_run_with_it_and_give_what_they_give_alone(kind, beams, backbone):
    model = FusedModel(backbone, make_plugin("spa", kind=kind))
    talk = PROMPTS[3]
    prompts = [talk[:5], PROMPTS[0], talk, talk[:12], talk[:5]]
    alone = [model.generate([prompt], NEW, beams=beams)[0] for prompt in prompts]
    together = model.generate(prompts, NEW, beams=beams)
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert [g.consulted for g in together] == [g.consulted for g in alone]


@pytest.mark.parametrize(
    ("kind", "sampling", "beams"),
    [
        pytest.param("tokenwise", Sampling(1.0), None, marks=pytest.mark.slow),
        ("tokenwise", Sampling(), Beams(3)),
        pytest.param("transformer", Sampling(), None, marks=pytest.mark.slow),
    ],
    ids=["sampled", "beams", "attending"],
)
def test_a_batch_that_is_padded_and_narrowed_gives_what_it_gives_whole(kind, sampling, beams, backbone):
    eos_ids = tuple(range(0, backbone.config.vocab_size, 5))  # a fifth of all tokens, so that groups end at all times
    model = FusedModel(dataclasses.replace(backbone, eos_ids=eos_ids), make_plugin("spa", kind=kind))
    prompts = [prompt[cut:] for prompt in PROMPTS for cut in (0, 1, 2)][:11]
    whole = model.generate(prompts, NEW, sampling, 3, beams)
    assert len({len(generation.tokens) for generation in whole}) > 3
    fused_programs.decode.clear_cache()
    narrowed = model.generate(prompts, NEW, sampling, 3, beams, batch_size=16)
    assert [(g.tokens, g.consulted) for g in narrowed] == [(g.tokens, g.consulted) for g in whole]
    assert fused_programs.decode._cache_size() in (2, 3)  # of 16 groups, and of fewer once or twice


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=20, top_p=0.95)], ids=["greedy", "sampled"])
def test_stream_equals_generate(sampling, fused):
    for prompt in PROMPTS[1:3]:
        (generation,) = fused("spa").generate([prompt], NEW, sampling, seed=5)
        streamed = list(fused("spa").stream(prompt, NEW, sampling, seed=5))
        assert streamed == list(zip(generation.tokens, generation.consulted))


def test_a_seed_reproduces_and_another_does_not(fused):
    model, sampling = fused("spa"), Sampling(1.0)
    first, again, other = (model.generate(PROMPTS, NEW, sampling, seed) for seed in (7, 7, 8))
    assert first == again
    assert all(a.tokens != b.tokens for a, b in zip(first, other))


@pytest.mark.parametrize(("setting", "never", "always"), [("spa", "base", "s1"), ("s2", "base", "s3")])
def test_the_threshold_goes_from_always_asking_to_never(setting, never, always, backbone, fused):
    for threshold, same in ((0.0, always), (1.0, never)):
        model = FusedModel(backbone, make_plugin(setting), threshold=threshold)
        generations = model.generate(PROMPTS, NEW)
        assert {generation.consulted_share for generation in generations} == {float(threshold == 0)}
        assert [g.tokens for g in generations] == [g.tokens for g in fused(same).generate(PROMPTS, NEW)]


def test_the_plugins_own_threshold_is_the_default(backbone, rerun):
    model = FusedModel(backbone, make_plugin("spa", threshold=0.9))
    assert model.threshold == 0.9
    generations = model.generate(PROMPTS, NEW)
    expected = [rerun("spa", prompt, threshold=0.9)[:2] for prompt in PROMPTS]
    assert [(generation.tokens, generation.consulted) for generation in generations] == expected
    assert expected[0] != rerun("spa", PROMPTS[0])[:2]


def compiled_programs():
    """How many variants of each program are compiled."""
    programs = (fused_programs.prefill, fused_programs.choose_first_token, fused_programs.decode)
    return [program._cache_size() for program in programs]


def test_the_loop_compiles_once_whatever_it_runs_to_and_however_it_samples(fused):
    model = fused("s1")
    model.generate(PROMPTS, NEW)
    before = compiled_programs()
    for sampling in (Sampling(), Sampling(0.7, 5, 0.9)):
        state = model.start(PROMPTS, NEW, sampling, 0)
        for target_length in (2, 5, NEW):
            state = model.advance(state, sampling, target_length)
            assert int(state.hypotheses.num_generated.max()) == target_length
    assert compiled_programs() == before


@pytest.mark.parametrize("kind", ["tokenwise", pytest.param("transformer", marks=pytest.mark.slow)])
def test_two_plugins_of_one_shape_compile_once(kind, backbone):
    plugin = make_plugin("spa", kind=kind)
    other = make_plugin("spa", threshold=0.7, kind=kind)
    other = dataclasses.replace(other, params=jax.tree.map(lambda leaf: leaf[::-1], other.params))
    first = FusedModel(backbone, plugin).generate(PROMPTS, NEW)
    before = compiled_programs()
    second = FusedModel(backbone, other).generate(PROMPTS, NEW)
    assert compiled_programs() == before
    assert second != first


def test_a_plugin_of_another_backbone_is_refused(backbone):
    foreign = dataclasses.replace(make_plugin("spa"), backbone="other", fingerprint="0" * 32)
    with pytest.raises(UserError, match="trained on the backbone 'other'"):
        FusedModel(backbone, foreign)


def test_prompts_that_do_not_fit_are_refused_and_the_longest_that_does_is_not(fused):
    model = fused("base")
    assert model.start([[1] * (CONTEXT - 2)], 2, Sampling(), 0).hypotheses.tokens.shape == (1, 1, 2)
    with pytest.raises(UserError, match=f"63 tokens and 2 new ones do not fit the backbone's context of {CONTEXT}"):
        model.generate([[1, 2], [1] * (CONTEXT - 1)], 2)


def test_tokens_beyond_the_embedding_are_refused_and_not_taken_for_its_last(fused, backbone):
    size = backbone.config.vocab_size
    with pytest.raises(UserError, match=f"this backbone has not: {size}, where its vocabulary has {size} "):
        fused("base").generate([[1, 2], [1, size]], 2)
