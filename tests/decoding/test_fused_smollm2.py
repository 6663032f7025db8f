"""Greedy decoding of the real SmolLM2 against transformers' PyTorch LLaMA with the same weights."""

import numpy as np
import pytest

from spa_jax.data.encoding import Encoder
from spa_jax.decoding.fused import FusedModel

pytestmark = pytest.mark.usefixtures("optimised")  # so large a model is worth it
NEW = 40
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours.",
    "Why is the sky blue? Answer in detail, as you would explain it to a curious child of seven years.",
    "Translate 'good morning' into Spanish.",
    "def fibonacci(n):",
    "12 + 30 =",
    "¿Qué hora es en 東京?",
    "Tell me a joke about a cat.",
    "Hi",
]


@pytest.fixture(scope="module")
def torch_smollm2(smollm2):
    """The same numbers in PyTorch, put there by a way of its own."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    c = smollm2.config
    assert (c.tie_word_embeddings, c.attention_bias, c.mlp_bias, c.rope_scaling) == (True, False, False, None)
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    blocks = smollm2.params["blocks"]
    state = {
        "model.embed_tokens.weight": smollm2.params["embed"]["embedding"],
        "model.norm.weight": smollm2.params["norm"]["scale"],
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"
        state[f"{layer}.input_layernorm.weight"] = blocks["attention_norm"]["scale"][i]
        state[f"{layer}.post_attention_layernorm.weight"] = blocks["mlp_norm"]["scale"][i]
        for name in "qkv":
            kernel = blocks["attention"][name]["kernel"][i]
            state[f"{layer}.self_attn.{name}_proj.weight"] = kernel.reshape(c.hidden_size, -1).T
        state[f"{layer}.self_attn.o_proj.weight"] = blocks["attention"]["o"]["kernel"][i].reshape(-1, c.hidden_size).T
        for name in ("gate", "up", "down"):
            state[f"{layer}.mlp.{name}_proj.weight"] = blocks["mlp"][name]["kernel"][i].T
    model.load_state_dict({name: torch.from_numpy(np.array(leaf)) for name, leaf in state.items()})
    return model


@pytest.mark.slow
def test_greedy_tokens_equal_pytorchs(smollm2, torch_smollm2):
    """By induction: PyTorch's choice after each prefix of our text, in one forward a text, is our next token."""
    import torch

    encoder = Encoder(smollm2.tokenizer, "chat", smollm2.config.max_position_embeddings)
    prompts = [encoder.prompt(question) for question in QUESTIONS]
    generations = FusedModel(smollm2, None).generate(prompts, NEW)
    compared, differences, least = 0, [], np.inf
    for question, prompt, generation in zip(QUESTIONS, prompts, generations):
        ours = np.array(generation.tokens)
        assert len(ours) == NEW or ours[-1] in smollm2.eos_ids
        with torch.no_grad():
            text = torch.tensor([[*prompt, *generation.tokens[:-1]]])
            logits = torch_smollm2(text).logits[0, len(prompt) - 1 :].numpy()
        best = np.sort(logits, axis=-1)[:, -2:]
        compared, least = compared + len(ours), min(least, (best[:, 1] - best[:, 0]).min())
        differences += [
            f"{question!r}, token {at}: PyTorch's choice is ahead by {logits[at].max() - logits[at, ours[at]]:.1e}"
            for at in np.flatnonzero(logits.argmax(axis=-1) != ours)
        ]
    print(f"\n{len(differences)} of {compared} tokens differ; the closest two best logits are {least:.1e} apart")
    assert not differences, "\n".join(differences)
    assert len({tuple(generation.tokens) for generation in generations}) == len(QUESTIONS)
    assert compared > 200
