"""Generate with a plugin: python -m spa_jax.generate --plugin=DIR/plugin --prompt="..." (or --interactive).

Tokens for which the device was asked are coloured, or [bracketed] where the output is no terminal.
"""

import sys
import time
from pathlib import Path
from typing import Any, cast

from absl import flags
from rich.console import Console
from rich.text import Text

from spa_jax import command
from spa_jax.data.encoding import Encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.models.combine import SETTINGS, Setting
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import load_backbone

PLUGIN = flags.DEFINE_string("plugin", None, "Directory of a plugin, as a training run leaves it.")
BACKBONE = flags.DEFINE_string("backbone", None, "Backbone by name, directory or .gguf file; the plugin's by default.")
PROMPT = flags.DEFINE_string("prompt", None, "What to answer.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Read prompts from the terminal, each answered on its own.")
SETTING = flags.DEFINE_enum("setting", None, SETTINGS, "base: the backbone alone; by default the plugin's own.")
THRESHOLD = flags.DEFINE_float("threshold", None, "Ask the device where p(consult) is above it, from 0 to 1.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to generate.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k likeliest tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens whose probabilities reach p; 1 is all.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
OUTPUT = flags.DEFINE_string("output", None, "Write text, tokens, sources and consulted share as JSON.")

DEVICE_STYLE = "bold magenta"


class Printer:
    """Prints tokens as they come, each in the style of its source; bytes of an unfinished character wait."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._console = Console(highlight=False, soft_wrap=True)
        self._tokens: list[int] = []
        self._printed = ""
        self._bracket = False

    def add(self, token: int, consulted: bool) -> None:
        self._tokens.append(token)
        text = self._encoder.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return
        piece, self._printed = text[len(self._printed) :], text
        if not piece:
            return
        if self._console.is_terminal:
            self._console.print(Text(piece, style=DEVICE_STYLE if consulted else ""), end="")
            return
        if consulted != self._bracket:
            space = piece[: len(piece) - len(piece.lstrip())]
            self._write(f"{space}[" if consulted else "]")
            piece = piece[len(space) :] if consulted else piece
            self._bracket = consulted
        self._write(piece)

    def finish(self) -> str:
        """Ends the line; returns the whole text."""
        text = self._encoder.tokenizer.decode(self._tokens, skip_special_tokens=True)
        self._write(text[len(self._printed) :] + ("]" if self._bracket else "") + "\n")
        return text

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def answer(model: FusedModel, encoder: Encoder, prompt: str, sampling: Sampling) -> dict[str, Any]:
    """Streams the answer to the terminal and returns it as `--output` writes it."""
    printer, tokens, sources = Printer(encoder), [], []
    began = time.perf_counter()
    for token, consulted in model.stream(encoder.prompt(prompt), MAX_NEW_TOKENS.value, sampling, SEED.value):
        tokens.append(token)
        sources.append("device" if consulted else "cloud")
        printer.add(token, consulted)
    text = printer.finish()
    share = sources.count("device") / len(sources)
    seconds = time.perf_counter() - began
    marked = "coloured" if Console().is_terminal else "in brackets"
    print(f"{len(tokens)} tokens in {seconds:.1f} s; consulted share {share:.2f} (tokens from the plugin {marked})")
    return {"prompt": prompt, "text": text, "tokens": tokens, "sources": sources, "consulted_share": share}


def main() -> None:
    if (PROMPT.value is None) == (not INTERACTIVE.value):
        raise UserError("give either --prompt='...' or --interactive")
    if PROMPT.value is not None and not PROMPT.value.strip():
        raise UserError("the prompt is empty")
    if PLUGIN.value is None and BACKBONE.value is None:
        raise UserError("name a plugin with --plugin=DIR, or a backbone alone with --backbone=NAME")
    if INTERACTIVE.value and OUTPUT.value:
        raise UserError("--output goes with --prompt, not with --interactive")
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value).check()
    plugin = load_plugin(Path(PLUGIN.value)) if PLUGIN.value is not None else None
    backbone = load_backbone(BACKBONE.value or (plugin.backbone if plugin else ""))
    model = FusedModel(backbone, plugin, cast(Setting | None, SETTING.value), THRESHOLD.value)
    template = plugin.template if plugin else ("chat" if backbone.tokenizer.chat_template else "plain")
    encoder = Encoder(backbone.tokenizer, template, backbone.config.max_position_embeddings)
    if PROMPT.value is not None:
        result = answer(model, encoder, PROMPT.value, sampling)
        if OUTPUT.value:
            write_json(Path(OUTPUT.value), result)
        return
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if prompt:
            try:
                answer(model, encoder, prompt, sampling)
            except UserError as error:  # such as one prompt that is too long: the next may be answered
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
