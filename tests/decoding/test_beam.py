"""Beam search against transformers' in PyTorch, and against all sequences there are."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.decoding.beam import Beams, search_step
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.hypotheses import init_hypotheses, last_tokens, parent_rows, to_generations
from spa_jax.errors import UserError
from spa_jax.weights.registry import load_backbone

NEW = 9
PROMPTS = [np.random.default_rng(seed).integers(0, 250, length).tolist() for seed, length in enumerate((4, 13, 1, 7))]


@pytest.fixture(scope="module")
def backbone(tiny_backbone_directory):
    """With a tenth of all tokens ending a text, so that hypotheses end at all lengths."""
    backbone = load_backbone(str(tiny_backbone_directory))
    return dataclasses.replace(backbone, eos_ids=(*backbone.eos_ids, *range(5, 250, 10)))


@pytest.fixture(scope="module")
def judge(backbone, tiny_backbone_directory):
    """(prompts, search) -> tokens and score of transformers' best hypothesis, each prompt padded on the left."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_backbone_directory, dtype=torch.float32).eval()

    def run(prompts, beams, new=NEW):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, num_beams=beams.width, max_new_tokens=new, do_sample=False, pad_token_id=0,
                eos_token_id=list(backbone.eos_ids), length_penalty=beams.length_penalty,
                early_stopping=beams.early_stopping, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        found = []
        for row in out.sequences[:, longest:].tolist():
            ends = [i for i, token in enumerate(row) if token in backbone.eos_ids]
            found.append(row[: ends[0] + 1] if ends else row)
        return found, out.sequences_scores.tolist()

    return run


@pytest.fixture(scope="module")
def fused(backbone):
    return FusedModel(backbone, None)


@pytest.mark.parametrize("early_stopping", [True, pytest.param(False, marks=pytest.mark.slow), "never"])
@pytest.mark.parametrize(
    "length_penalty", [1.0, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.0, 2.5)), -1.0]
)
def test_the_best_hypothesis_is_that_of_transformers(length_penalty, early_stopping, fused, judge):
    beams = Beams(4, length_penalty, early_stopping)
    tokens, scores = judge(PROMPTS, beams)
    found = fused.generate(PROMPTS, NEW, beams=beams)
    assert [generation.tokens for generation in found] == tokens
    np.testing.assert_allclose([generation.score for generation in found], scores, rtol=1e-4)


@pytest.mark.parametrize("width", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_every_width_is_that_of_transformers(width, fused, judge):
    beams = Beams(width)
    tokens, scores = judge(PROMPTS, beams)
    found = fused.generate(PROMPTS, NEW, beams=beams)
    assert [generation.tokens for generation in found] == tokens
    np.testing.assert_allclose([generation.score for generation in found], scores, rtol=1e-4)
    lengths = {len(generation.tokens) for generation in found}
    assert len(lengths) > 1, "no hypothesis ended before the others: choose other prompts"


def test_a_prompt_in_a_batch_gives_what_it_gives_alone(fused):
    beams = Beams(3)
    together = fused.generate(PROMPTS, NEW, beams=beams)
    for prompt, generation in zip(PROMPTS, together):
        (alone,) = fused.generate([prompt], NEW, beams=beams)
        assert alone.tokens == generation.tokens
        assert alone.score == pytest.approx(generation.score, rel=1e-5)


def test_as_wide_as_the_tree_it_finds_the_best_of_all_sequences():
    """A Markov chain over 4 tokens, of which 3 ends: 3 ** 4 ways to go on after 4 tokens, and a beam for each."""
    transitions = np.log(np.random.default_rng(0).dirichlet(np.ones(4), size=4)).astype(np.float32)
    beams, new, end = Beams(81, 0.7), 4, 3

    def score(sequence):
        logs = [transitions[before, after] for before, after in itertools.pairwise((0, *sequence))]
        return sum(logs) / len(sequence) ** 0.7

    ended = [(*body, end) for n in range(new) for body in itertools.product(range(end), repeat=n)]
    unended = list(itertools.product(range(end), repeat=new))
    best = max(ended + unended, key=score)

    @jax.jit
    def step(hypotheses, tokens):
        logits = jnp.asarray(transitions)[tokens]
        return search_step(beams, hypotheses, logits, tokens == 1, ~hypotheses.is_done, (end,))

    hypotheses, tokens = init_hypotheses(1, 81, new, 0, search=True), jnp.zeros((1, 81), jnp.int32)
    for _ in range(new):
        hypotheses, parents = step(hypotheses, tokens)
        assert parent_rows(parents).shape == (81,)
        tokens = last_tokens(hypotheses)
    (found,) = to_generations(hypotheses, (end,))
    assert tuple(found.tokens) == best
    assert found.score == pytest.approx(score(best), rel=1e-5)
    assert found.consulted == [before == 1 for before in (0, *best[:-1])]


def test_groups_that_are_not_active_stay_as_they_are():
    hypotheses = init_hypotheses(2, 3, 5, 0, search=True)
    logits = np.random.default_rng(0).standard_normal((2, 3, 20)).astype(np.float32)
    asked = np.ones((2, 3), bool)
    step = jax.jit(search_step, static_argnums=(0, 5))
    first, _ = step(Beams(3), hypotheses, logits, asked, np.array([True, True]), (19,))
    second, parents = step(Beams(3), first, logits, asked, np.array([False, True]), (19,))
    np.testing.assert_array_equal(np.asarray(parents)[0], [0, 1, 2])
    assert second.num_generated.tolist() == [1, 2]
    for before, after in ((first.tokens, second.tokens), (first.scores, second.scores)):
        np.testing.assert_array_equal(np.asarray(before)[0], np.asarray(after)[0])


def test_no_beams_are_refused():
    with pytest.raises(UserError, match="beams is 0"):
        Beams(0).check()
