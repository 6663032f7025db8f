"""Models that are LLaMA but for a detail generate what transformers' own classes generate."""

import dataclasses

import numpy as np
import pytest

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.weights.huggingface import load_directory

NEW = 8
PROMPTS = [np.random.default_rng(seed).integers(0, 250, length).tolist() for seed, length in enumerate((3, 11, 6))]


@pytest.mark.parametrize(
    "overrides",
    [
        {"kind": "Mistral", "sliding_window": 32},
        pytest.param({"kind": "Qwen2"}, marks=pytest.mark.slow),
        {"kind": "Qwen3", "head_dim": 12},
    ],
    ids=lambda overrides: overrides["kind"],
)
def test_greedy_and_beam_search_are_those_of_transformers(overrides, save_model):
    torch = pytest.importorskip("torch")
    model, directory = save_model(**overrides)
    backbone = dataclasses.replace(load_directory(directory), eos_ids=(7, 9))
    fused = FusedModel(backbone, None)
    for width in (1, 3):
        found = fused.generate(PROMPTS, NEW, beams=Beams(width) if width > 1 else None)
        for prompt, generation in zip(PROMPTS, found):
            with torch.no_grad():
                out = model.generate(
                    torch.tensor([prompt]), num_beams=width, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                    eos_token_id=[7, 9],
                )  # fmt: skip
            assert generation.tokens == out[0, len(prompt) :].tolist()


def test_a_sequence_in_which_the_sliding_window_would_bind_is_refused(save_model):
    _, directory = save_model(kind="Mistral", sliding_window=32)
    fused = FusedModel(load_directory(directory), None)
    with pytest.raises(UserError, match="32"):
        fused.generate([list(range(30))], NEW)
