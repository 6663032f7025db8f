"""Table 2: what 50 new tokens take with each method, and ROUGE-L beside LoRA and Adapter.

    python -m experiments.table2 --scale=mini --data=DIR

Times are medians over test questions, by the method's own programs over a simulated link of the paper's 3.82 ms and
1 Gbit/s, on a virtual clock: inference is what cloud and device compute here, network is equation 6, and total their
sum (equation 4). LoRA and Adapter ask the device at every layer, so their programs run layer by layer, and LST asks it
for every token. What they learn changes neither, so they are timed as their trainings start; SPA is trained, since how
often it asks is what it has learned. SPA's and LST's taps travel as bfloat16, and all methods are trained on the same
rows, lengths and epochs.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

from experiments.ablation import hardware
from experiments.cells import Bench, Cell, Training
from experiments.report import Entry, main_of, number, score, write
from experiments.scales import LEARNING_RATES, TITLES, Scale
from spa_jax.data.encoding import Encoder
from spa_jax.data.tasks import load_split
from spa_jax.files import write_json
from spa_jax.models.peft import Peft, PeftConfig
from spa_jax.split.channel import Traffic
from spa_jax.split.generation import generate
from spa_jax.split.latency import total_seconds
from spa_jax.split.layerwise import LayerwiseCloud, LayerwiseDevice
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.split.simulated import Network, Simulated
from spa_jax.training.config import DataConfig, RunConfig
from spa_jax.training.rows import make_encoder
from spa_jax.training.run import trainable_params, trained_config
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import PeftPlugin
from spa_jax.weights.plugin import Plugin, load_plugin

TOKENS, QUESTIONS = 50, 5
COLUMNS = ("% param", "inference s", "network s", "total s", "ratio")
METHODS = {"LoRA": "lora", "Adapter": "adapter", "LST": "s3", "SPA": "spa"}
PAPER = {
    "LoRA": (0.19, 3.26, 6.37, 9.63, 32.0),
    "Adapter": (0.38, 3.32, 12.56, 15.88, 64.0),
    "LST": (0.2, 3.29, 0.31, 3.60, 1.0),
    "SPA": (0.21, 3.30, 0.18, 3.48, 0.62),
}
PAPER_SCORES = {
    "LoRA": {"xsum": 38.24, "coqa": 40.32},
    "Adapter": {"xsum": 38.18, "coqa": 40.51},
    "LST": {"xsum": 28.78, "coqa": 31.24},
    "SPA": {"xsum": 35.52, "coqa": 37.30},
}


def table(task: str, scale: Scale) -> dict[str, Cell]:
    """The cells of a column."""
    training = functools.partial(Training, task, epochs=scale.through_epochs[task])
    return {
        "LoRA": Cell(task, "lora", training(setting="lora")),
        "Adapter": Cell(task, "adapter", training(setting="adapter")),
        "LST": Cell(task, "s3", training(setting="s2", short=True)),
        "SPA": Cell(task, "spa", training(short=True)),
    }


def cells(scale: Scale) -> list[Cell]:
    return [cell for task in scale.through_epochs for cell in table(task, scale).values()]


def latency(bench: Bench, name: str) -> dict[str, Any] | None:
    """Seconds and exchanges of 50 tokens; measured once and kept."""
    path = bench.results / "latency" / f"{METHODS[name]}.json"
    kept = bench.kept(path)
    if kept is not None or not bench.may_run:
        return kept
    task = next(iter(bench.scale.through_epochs))
    training = table(task, bench.scale)[name].training
    assert training is not None
    config = bench.config(training, LEARNING_RATES[0])  # the rate matters only to a training
    encoder, backbone = make_encoder(bench.backbone, config.data), dataclasses.replace(bench.backbone, eos_ids=())
    prompts = questions(encoder, config.data)
    plugin: Plugin | PeftPlugin
    if name == "SPA":
        plugin = load_plugin(bench.train(training) / "plugin")
    else:
        plugin = untrained(config, backbone, encoder.template)
    cloud = Cloud(backbone)

    def answer(prompt: list[int]) -> tuple[float, Traffic]:
        began = time.perf_counter()
        if isinstance(plugin, PeftPlugin):
            device = LayerwiseDevice(Peft(plugin.config, plugin.params), backbone.config, "bfloat16")
            channel = Simulated(device.answer, Network())
            traffic = LayerwiseCloud(backbone, plugin.config, "bfloat16", channel).generate(prompt, TOKENS + 1)[1]
        else:
            request = open_message(plugin, [prompt], TOKENS, "bfloat16", "s3" if name == "LST" else None)
            traffic = generate(cloud, plugin, request, functools.partial(Simulated, network=Network())).traffic
        return time.perf_counter() - began, traffic

    for prompt in prompts:
        answer(prompt)  # compiles
    seconds, traffics = zip(*map(answer, prompts))
    inference = statistics.median(seconds)
    network = statistics.median(traffic.network_seconds for traffic in traffics)
    found = {
        "hardware": hardware(),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "inference_seconds": inference,
        "network_seconds": network,
        "total_seconds": total_seconds(0.0, inference, network),
        "ratio": statistics.median(traffic.exchanges / TOKENS for traffic in traffics),
        "bytes": statistics.median(traffic.bytes_down + traffic.bytes_up for traffic in traffics),
    }
    write_json(path, found)
    return found


def questions(encoder: Encoder, config: DataConfig) -> list[list[int]]:
    """Prompts of the first questions of the test split."""
    examples, _ = encoder.encode_all(load_split(config.task, config.directory, "test")[:QUESTIONS])
    return [example.prompts[0] for example in examples]


def untrained(config: RunConfig, backbone: Backbone, template: str) -> Plugin | PeftPlugin:
    """What a run starts from: as large and as fast as what it ends with."""
    trained = trained_config(config, backbone)
    rest = trainable_params(config, trained, backbone), backbone.name, backbone.fingerprint, template
    return PeftPlugin(trained, *rest) if isinstance(trained, PeftConfig) else Plugin(trained, *rest)


def report(bench: Bench) -> None:
    rows: dict[str, dict[str, Entry]] = {}
    for name, paper in PAPER.items():
        measured, columns = latency(bench, name), {}
        for column, key, said in zip(
            COLUMNS, ("", "inference_seconds", "network_seconds", "total_seconds", "ratio"), paper
        ):
            columns[column] = number(measured, key, said)
        for task in bench.scale.through_epochs:
            cell = table(task, bench.scale)[name]
            assert cell.training is not None
            columns["% param"] = number(bench.summary(cell.training), "params/trainable_percent", paper[0])
            columns[TITLES[task]] = score(bench.result(cell), paper=PAPER_SCORES[name].get(task))
        rows[name] = columns
    notes = [
        f"Medians over {QUESTIONS} questions, EOS not heeded. Inference holds the prompt too, which costs every method "
        "the same backbone pass. The ratio is of exchanges to tokens; the cloud asks LoRA's device once a layer and "
        "Adapter's twice.",
    ]
    write(bench, "table2", "Table 2: 50 tokens by each method", rows, notes, plot=False)


if __name__ == "__main__":
    main_of(report)
