"""The common part of measurements against PyTorch: the same weights there, and each side in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.timing import THREADS
from spa_jax.weights.backbone import Backbone


def run_child(module: str, side: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs one side of a measurement, `python -m MODULE --side=SIDE`, and returns what it wrote to its file."""
    output = folder / f"{side}.json"
    command = [sys.executable, "-m", module, f"--side={side}", f"--folder={folder}", *arguments]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"})
    return json.loads(output.read_text(encoding="utf-8"))


def peak_bytes() -> int:
    """Returns this process's peak resident memory (Linux; `ru_maxrss` would count the parent's too)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def hf_tensors(backbone: Backbone) -> dict[str, np.ndarray]:
    """Returns the backbone's weights in float32 by their Hugging Face names; tied ones twice."""
    blocks, d = backbone.params["blocks"], backbone.config.hidden_size
    tensors = {
        "model.embed_tokens.weight": backbone.params["embed"]["embedding"],
        "model.norm.weight": backbone.params["norm"]["scale"],
    }
    head = backbone.params.get("lm_head")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] if head is None else head["kernel"].T
    for i in range(backbone.config.num_layers):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = blocks["attention_norm"]["scale"][i]
        tensors[f"{layer}.post_attention_layernorm.weight"] = blocks["mlp_norm"]["scale"][i]
        for name in "qkv":
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = blocks["attention"][name]["kernel"][i].reshape(d, -1).T
        tensors[f"{layer}.self_attn.o_proj.weight"] = blocks["attention"]["o"]["kernel"][i].reshape(-1, d).T
        for name in ("gate", "up", "down"):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = blocks["mlp"][name]["kernel"][i].T
    return {name: np.array(leaf, np.float32) for name, leaf in tensors.items()}


def export(backbone: Backbone, directory: Path) -> None:
    """Writes the backbone as a directory that `transformers` reads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = backbone.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings, eos_token_id=list(backbone.eos_ids) or None, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in hf_tensors(backbone).items()})
    model.save_pretrained(directory)
