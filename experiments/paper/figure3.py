"""Figure 3: what the plugin says of a person's life, each token by its source; terminal, HTML and PNG.

    python -m experiments.paper.figure3 --plugin=runs/quickstart/plugin

Held-out questions of the embedded default. Of each token that the device was asked for, the JSON also has what the
backbone alone would have said there. The paper's colours: the cloud's tokens blue, the device's black.
"""

import math
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.text import Text

from experiments.paper.report import RESULTS, plt
from experiments.record import write_record
from spa_jax import command
from spa_jax.data import persona
from spa_jax.data.detokenizing import token_texts
from spa_jax.decoding.encoders import prompt_encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.files import write_bytes
from spa_jax.scoring.effect import alternatives
from spa_jax.weights.plugin import load_plugin
from spa_jax.weights.registry import load_backbone

flags.declare_key_flag("results")  # of experiments.paper.report; --help shows it
PLUGIN = flags.DEFINE_string("plugin", "runs/quickstart/plugin", "Directory of the quickstart's plugin.")
QUESTIONS, NEW_TOKENS, COLUMNS = 6, 48, 92
COLUMN = 0.1  # inches
FONT_SIZE = 72 * COLUMN / 0.602  # points, of the font in which a letter is this much of its size wide
CLOUD, DEVICE = "#1f5fd0", "#000000"


def answers(plugin_directory: Path) -> list[dict[str, Any]]:
    """Returns each question, and of each generated token its text, its source, and the backbone's choice where the
    device was asked."""
    plugin = load_plugin(plugin_directory)
    backbone = load_backbone(plugin.backbone)
    model = FusedModel(backbone, plugin)
    encoder = prompt_encoder(backbone, plugin)
    _, held_out = persona.generate()
    asked = held_out[:: len(held_out) // QUESTIONS][:QUESTIONS]
    prompts = [encoder.prompt(pair.source) for pair in asked]
    generations = model.generate(prompts, NEW_TOKENS)
    base = alternatives(model, [(p, g.tokens) for p, g in zip(prompts, generations)])
    found = []
    for pair, generation, others in zip(asked, generations, base):
        texts = token_texts(encoder.tokenizer, generation.tokens)
        tokens = [
            {"text": text, "source": "device", "cloud_alone": encoder.tokenizer.decode([other])}
            if consulted
            else {"text": text, "source": "cloud"}
            for text, consulted, other in zip(texts, generation.consulted, others)
        ]
        found.append({"question": pair.source, "tokens": tokens})
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draws monospaced text in two colours."""
    lines: list[list[tuple[str, str]]] = []
    for answer in found:
        lines += [[(answer["question"][:COLUMNS], "#777777")], []]
        for token in answer["tokens"]:
            text, colour = token["text"].replace("\n", " "), DEVICE if token["source"] == "device" else CLOUD
            if sum(len(part) for part, _ in lines[-1]) + len(text) > COLUMNS:
                lines.append([])
            lines[-1].append((text, colour))
        lines.append([])
    figure = plt.figure(figsize=(COLUMNS * COLUMN, len(lines) * 0.22))
    for row, line in enumerate(lines):
        column = 0
        for text, colour in line:
            x, y = column / COLUMNS, 1 - (row + 1) / len(lines)
            figure.text(x, y, text, color=colour, family="DejaVu Sans Mono", fontsize=FONT_SIZE, parse_math=False)
            column += len(text)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    directory = Path(PLUGIN.value)
    if not directory.is_dir():
        raise UserError(f"there is no plugin '{directory}': run the line of README's quickstart first")
    found = answers(directory)
    console = Console(record=True, width=COLUMNS, highlight=False)
    for answer in found:
        console.print(Text(answer["question"], style="dim"))
        line = Text()
        for token in answer["tokens"]:
            line.append(token["text"], style="bold" if token["source"] == "device" else "blue")
        console.print(line, end="\n\n")
    output = Path(RESULTS.value)
    write_bytes(output / "figure3.html", console.export_html().encode())
    shares = [sum(token["source"] == "device" for token in answer["tokens"]) for answer in found]
    share = sum(shares) / math.fsum(len(answer["tokens"]) for answer in found)
    record = {"consulted_share": share, "answers": found}
    write_record(output / "figure3.json", "paper.figure3 --plugin=runs/quickstart/plugin", record)
    draw(found, output / "figure3.png")


if __name__ == "__main__":
    command.run(main)
