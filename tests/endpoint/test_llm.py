"""Programs that people already use, unchanged, with the endpoint of a device: the command `llm` from PyPI."""

import os
import subprocess
import sys

import pytest
from test_openai_client import QUESTION

pytestmark = pytest.mark.slow


@pytest.fixture
def llm(url, tmp_path):
    """Runs `llm`, which knows two of our models."""
    models = "".join(
        f"- model_id: {name}\n  model_name: {name}\n  api_base: {url}/v1\n  can_stream: true\n"
        for name in ("mine", "base")
    )
    (tmp_path / "extra-openai-models.yaml").write_text(models)

    def run(*arguments):
        command = [sys.executable, "-m", "llm", *arguments]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout

    return run


@pytest.mark.parametrize("model", ["mine", "base"])
@pytest.mark.parametrize("how", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_llm_says_what_the_api_says(model, how, llm, url):
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model=model, messages=messages).choices[0].message.content
    assert llm("-m", model, "--key", "none", *how, QUESTION).strip() == answer.strip()
