"""llama.cpp's part of measurements against it: the same weights as a GGUF file, and its server."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import httpx2
import numpy as np

from experiments.benchmarks.ports import free_port
from experiments.benchmarks.pytorch import hf_tensors
from experiments.benchmarks.timing import THREADS
from spa_jax.errors import UserError
from spa_jax.weights.backbone import Backbone

START_SECONDS = 120.0


def write_gguf(backbone: Backbone, path: Path, kind: str) -> None:
    """Writes a backbone with LLaMA's blocks and a byte-level vocabulary as llama.cpp's file.

    Args:
        backbone: without biases, norms of queries and keys, and rescaled rotary frequencies.
        path: of the file.
        kind: of its matrices, such as `F16` or `Q8_0`; vectors are always float32.
    """
    c, writer = backbone.config, gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    _add_vocabulary(writer, backbone)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_layers)
    heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads}
    for name, tensor in hf_tensors(backbone).items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if (projection := name.split(".")[-2]) in heads:  # llama.cpp has the rows of a rotary pair side by side
            halves = tensor.reshape(heads[projection], 2, -1, c.hidden_size)
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        kept_as = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, gguf.quants.quantize(tensor, kept_as), raw_dtype=kept_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, backbone: Backbone) -> None:
    tokenizer, ids = backbone.tokenizer, range(backbone.config.vocab_size)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token or f"<unused {i}>" for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids))])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in ids])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(backbone.eos_ids[0])
    writer.add_add_bos_token(False)


class LlamaServer:
    """A running `llama-server`, which generates greedily and never ends early."""

    def __init__(self, url: str) -> None:
        self.url = url

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Sends all prompts at once, and returns the new tokens of each."""
        return asyncio.run(self._together(prompts, new))

    async def _together(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        limits = httpx2.Limits(max_connections=len(prompts))
        async with httpx2.AsyncClient(base_url=self.url, timeout=None, limits=limits) as client:

            async def one(prompt: Sequence[int]) -> list[int]:
                body = {
                    "prompt": prompt, "n_predict": new, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True,
                    "cache_prompt": False, "return_tokens": True,
                }  # fmt: skip
                response = await client.post("/completion", json=body)
                return list(response.raise_for_status().json()["tokens"])

            return await asyncio.gather(*map(one, prompts))


@contextlib.contextmanager
def llama_server(program: str, model: Path, slots: int, length: int) -> Iterator[LlamaServer]:
    """Runs a server while this context lasts.

    Args:
        program: path of llama.cpp's `llama-server`.
        model: GGUF file.
        slots: prompts at once.
        length: most tokens of a prompt and its answer together.

    Raises:
        UserError: it cannot be run, or does not come up.
    """
    port = free_port()
    command = [
        program, f"--model={model}", "--host=127.0.0.1", f"--port={port}", f"--parallel={slots}",
        f"--ctx-size={slots * length}", f"--threads={THREADS}", f"--threads-batch={THREADS}", "--cache-ram=0",
        "--offline", "--log-disable",
    ]  # fmt: skip
    words = [word for part in command for word in (part.split("=", 1) if part.startswith("--") else [part])]
    try:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"--llama_server={program} cannot be run: {error}") from error
    with process:
        try:
            server = LlamaServer(f"http://127.0.0.1:{port}")
            _wait_for(server, process)
            yield server
        finally:
            process.terminate()


def _wait_for(server: LlamaServer, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{server.url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise UserError("llama-server did not come up: its own message is above")
