"""What llama.cpp reads is SmolLM2: our reader, which is tested against llama.cpp's own package, finds it again."""

import jax
import numpy as np
import pytest

from experiments.benchmarks.llama_cpp import llama_server, write_gguf
from spa_jax.errors import UserError
from spa_jax.weights.gguf import load_gguf


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 1e-2)])
def test_the_file_has_the_backbone(kind, tolerance, smollm2, tmp_path):
    write_gguf(smollm2, tmp_path / "model.gguf", kind)
    read = load_gguf(tmp_path / "model.gguf")
    assert read.config == smollm2.config
    assert set(read.eos_ids) <= set(smollm2.eos_ids)
    text = "<|im_start|>user\nWas it 1 or 2?<|im_end|>"
    assert read.tokenizer.encode(text) == smollm2.tokenizer.encode(text)

    def assert_close(leaf, kept):
        np.testing.assert_allclose(leaf, kept, rtol=0, atol=tolerance * np.abs(kept).max())

    jax.tree.map(assert_close, read.params, smollm2.params)


def test_a_server_that_is_none_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be run"), llama_server(str(tmp_path / "none"), tmp_path, 1, 8):
        pass
