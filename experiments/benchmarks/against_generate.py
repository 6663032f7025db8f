"""Generation against `transformers` in PyTorch: SmolLM2 in float32 on two threads, one side after the other.

    python -m experiments.benchmarks.against_generate

Medians of `REPEATS`: a forward of 8 x 224 tokens (prefill), the first token of a prompt of 64, greedy decoding and beam
search with 4 beams of 48 more tokens, and greedy decoding of 16 prompts at once. Each side is a process of its own, and
the two take turns `ROUNDS` times.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from experiments.benchmarks.output import write_result
from experiments.benchmarks.pytorch import export, run_child
from experiments.benchmarks.timing import BACKBONE, THREADS, use_threads
from experiments.record import print_table
from spa_jax import command
from spa_jax.files import write_json
from spa_jax.weights.registry import load_backbone

SIDE = flags.DEFINE_enum("side", None, ["pytorch", "spa_jax"], "Runs one side; for this command's own use.")
FOLDER = flags.DEFINE_string("folder", None, "Directory of the two sides' files; for this command's own use.")

PROMPT, NEW, BATCH, REPEATS, ROUNDS = 64, 48, 16, 3, 2
Measured = dict[str, float]


def median_seconds(way: Callable[[], object]) -> float:
    """Returns the median of `REPEATS` runs after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        way()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def summarise(prefill: float, first: float, greedy: float, beam: float, batch: float) -> Measured:
    """Turns seconds of each way into what is compared; the prompt's time is taken off where tokens are counted."""
    return {
        "prefill_tokens_per_second": 8 * 224 / prefill,
        "seconds_to_first_token": first,
        "decode_tokens_per_second": NEW / (greedy - first),
        "beam4_tokens_per_second": NEW / (beam - first),
        "batch16_tokens_per_second": BATCH * NEW / batch,
    }


def measure_pytorch(folder: Path, prompts: np.ndarray, block: np.ndarray) -> Measured:
    """Times generation by `transformers`."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    one, many, wide = (torch.from_numpy(a).long() for a in (prompts[:1], prompts, block))

    def generate(ids: torch.Tensor, new: int, beams: int = 1) -> object:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=beams, max_new_tokens=new,
            min_new_tokens=new, pad_token_id=0,
        )  # fmt: skip

    with torch.inference_mode():
        return summarise(
            median_seconds(lambda: model.model(wide, use_cache=False)),
            median_seconds(lambda: generate(one, 1)),
            median_seconds(lambda: generate(one, NEW + 1)),
            median_seconds(lambda: generate(one, NEW + 1, 4)),
            median_seconds(lambda: generate(many, NEW + 1)),
        )


def measure_spa_jax(prompts: np.ndarray, block: np.ndarray) -> Measured:
    """Times `FusedModel` of the backbone alone."""
    import dataclasses

    import jax

    from spa_jax.decoding.beam import Beams
    from spa_jax.decoding.fused import FusedModel
    from spa_jax.models.llama import Llama

    backbone = dataclasses.replace(load_backbone(BACKBONE), eos_ids=())
    model, llama = FusedModel(backbone, None), Llama(backbone.config)
    positions = np.broadcast_to(np.arange(block.shape[1], dtype=np.int32), block.shape)
    forward = jax.jit(lambda params, tokens: llama.apply({"params": params}, tokens, positions).hidden)

    def generate(count: int, new: int, beams: Beams | None = None) -> object:
        return model.generate(prompts[:count].tolist(), new, beams=beams)

    return summarise(
        median_seconds(lambda: forward(backbone.params, block).block_until_ready()),
        median_seconds(lambda: generate(1, 1)),
        median_seconds(lambda: generate(1, NEW + 1)),
        median_seconds(lambda: generate(1, NEW + 1, Beams(4))),
        median_seconds(lambda: generate(BATCH, NEW + 1)),
    )


def main() -> None:
    rng = np.random.default_rng(0)
    prompts, block = (rng.integers(100, 40_000, shape).astype(np.int32) for shape in ((BATCH, PROMPT), (8, 224)))
    if SIDE.value:
        use_threads()
        folder = Path(str(FOLDER.value))
        ours = SIDE.value == "spa_jax"
        found = measure_spa_jax(prompts, block) if ours else measure_pytorch(folder, prompts, block)
        write_json(folder / f"{SIDE.value}.json", found)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(load_backbone(BACKBONE), folder / "model")
        rounds = [
            {
                side: run_child("experiments.benchmarks.against_generate", side, folder)
                for side in ("pytorch", "spa_jax")
            }
            for _ in range(ROUNDS)
        ]
    sides = {
        side: {key: statistics.median(found[side][key] for found in rounds) for key in rounds[0][side]}
        for side in rounds[0]
    }
    ratios, cells = {}, []
    for key, theirs in sides["pytorch"].items():
        ours = sides["spa_jax"][key]
        ratios[key] = ours / theirs if key.endswith("per_second") else theirs / ours
        cells.append((key, f"{theirs:,.3f}", f"{ours:,.3f}", f"{ratios[key]:.2f}"))
    print_table(("", "PyTorch", "spa_jax", "ratio"), cells)
    write_result("against_generate", {**sides, "times_better": ratios}, threads=THREADS)


if __name__ == "__main__":
    command.run(main)
