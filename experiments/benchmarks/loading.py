"""Host memory while a checkpoint is loaded by several processes: python -m experiments.benchmarks.loading

Writes a random checkpoint of LLaMA's shape, loads it in 1, 2 and 4 processes of one device each, and measures the most
memory that a process held beyond what it held before (its own memory, and with the pages of the checkpoint that it has
mapped). The processes find each other as those of a training do.
"""

import json
import multiprocessing
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import psutil
import safetensors.numpy
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from experiments.benchmarks.output import write_result
from experiments.benchmarks.ports import free_port
from experiments.record import print_table
from spa_jax import command
from spa_jax.training.processes import DistributedConfig, init_distributed
from spa_jax.training.sharding import MeshConfig, MeshPartitioner, make_mesh
from spa_jax.weights.architectures import ARCHITECTURES
from spa_jax.weights.registry import load_backbone

LAYERS, WIDTH, FEED_FORWARD, HEADS, VOCABULARY = 16, 1536, 4096, 12, 32000
PROCESSES = (1, 2, 4)
MIB = 2**20


def write_checkpoint(directory: Path) -> int:
    """Writes a random checkpoint in bfloat16, a file for each block, and returns its bytes."""
    rng, total = np.random.default_rng(0), 0
    index: dict[str, str] = {}
    outer = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    square = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    wide = {"mlp.gate_proj": (FEED_FORWARD, WIDTH), "mlp.up_proj": (FEED_FORWARD, WIDTH)}
    norms = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    block = {**square, **wide, "mlp.down_proj": (WIDTH, FEED_FORWARD), **norms}
    parts = [outer, *({f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(LAYERS))]
    for number, part in enumerate(parts):
        file = f"model-{number}.safetensors"
        tensors = {f"{name}.weight": _random(rng, shape).astype(ml_dtypes.bfloat16) for name, shape in part.items()}
        safetensors.numpy.save_file(tensors, directory / file)
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "eos_token_id": 2,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(directory)
    return total


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 0.02 * rng.standard_normal(shape, np.float32)


def load(directory: str, coordinator: str, count: int, process: int, answers: Any) -> None:
    """Loads it in a process of its own; answers (its slices, most memory of its own, most with mapped pages), bytes."""
    init_distributed(DistributedConfig(count > 1, coordinator, count, process, 100))
    partitioner = MeshPartitioner(make_mesh(MeshConfig(1, count, 1, 1), count))
    me, most = psutil.Process(), {"own": 0, "resident": 0}
    stop = _watch(me, most)
    before = dict(most)
    backbone = load_backbone(directory, "bfloat16", partitioner)
    slices = sum(shard.data.nbytes for leaf in jax.tree.leaves(backbone.params) for shard in leaf.addressable_shards)
    stop()
    answers.put((slices, most["own"] - before["own"], most["resident"] - before["resident"]))


def _watch(process: Any, most: dict[str, int]) -> Any:
    """Notes the most memory there was, until the function that it returns is called."""
    done = threading.Event()

    def note() -> None:
        memory = process.memory_info()
        most["own"] = max(most["own"], memory.rss - memory.shared)
        most["resident"] = max(most["resident"], memory.rss)

    def watch() -> None:
        while not done.wait(0.002):
            note()

    note()
    thread = threading.Thread(target=watch)
    thread.start()

    def stop() -> None:
        done.set()
        thread.join()

    return stop


def measure(directory: str, count: int) -> dict[str, float]:
    """Returns the memory of the process that took most, in MiB."""
    coordinator = f"127.0.0.1:{free_port()}"
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    started = [spawn.Process(target=load, args=(directory, coordinator, count, i, answers)) for i in range(count)]
    for process in started:
        process.start()
    measured = [answers.get(timeout=600) for _ in started]
    for process in started:
        process.join()
    slices, own, resident = (max(column) / MIB for column in zip(*measured))
    return {"own_slices": slices, "most_of_its_own": own, "most_with_mapped_pages": resident}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        total = write_checkpoint(Path(directory))
        found = {count: measure(directory, count) for count in PROCESSES}
    columns = ("processes", "its slices, MiB", "most of its own, MiB", "most with mapped pages, MiB")
    print_table(columns, [[str(count), *(f"{x:.0f}" for x in row.values())] for count, row in found.items()])
    largest, big = 2 * VOCABULARY * WIDTH, ARCHITECTURES["llama-2-70b"]
    predicted = {hosts: 2 * (big.num_params / hosts + big.vocab_size * big.hidden_size) / 2**30 for hosts in (4, 16)}
    sizes = {"checkpoint_mib": total / MIB, "largest_tensor_mib": largest / MIB, "mib_by_processes": found}
    sizes["predicted_gib_of_llama_2_70b_by_hosts"] = predicted  # slices and the largest tensor
    write_result("loading", sizes)


if __name__ == "__main__":
    command.run(main)
