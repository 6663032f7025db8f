"""Table 2: what 50 new tokens take with each method, and ROUGE-L beside LoRA and Adapter.

    python -m experiments.paper.table2 --scale=mini --data=DIR

Times are medians over test questions, by the method's own programs over a simulated link of the paper's 3.82 ms and
1 Gbit/s, on a virtual clock. Inference is what cloud and device compute here, opening is the network's time before the
first question about a new token (for the prompt's taps and corrections), network is equation 6 for the new tokens, and
total is inference and network together (equation 4). LoRA and Adapter ask the device at every layer, so their programs
run layer by layer, and LST asks it for every token. What they learn changes neither, so they are timed as their
trainings start; SPA is trained, since how often it asks is what it has learned. SPA's and LST's taps travel as
bfloat16, and all methods are trained on the same rows, lengths and epochs.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

from absl import flags

from experiments.paper import report as reporting
from experiments.paper.cells import Cell, cell_of, short_training
from experiments.paper.report import Rows, TableEntry, entry, run_report, write
from experiments.paper.scales import LEARNING_RATES, TITLES, Scale
from experiments.paper.store import CellStore
from experiments.record import hardware
from spa_jax.data.encoding import Encoder
from spa_jax.data.tasks import load_split
from spa_jax.files import write_json
from spa_jax.models.peft import Peft
from spa_jax.split.channel import Traffic
from spa_jax.split.generation import generate
from spa_jax.split.latency import total_seconds
from spa_jax.split.layerwise import LayerwiseCloud, LayerwiseDevice
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.split.simulated import Network, Simulated
from spa_jax.training.config import DataConfig, RunConfig
from spa_jax.training.methods import recipe_from_config
from spa_jax.training.rows import make_encoder
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import load_trained
from spa_jax.weights.plugin import Trained

flags.adopt_module_key_flags(reporting)  # --help shows them

TOKENS, QUESTIONS = 50, 5
MEASURED = {
    "inference s": "inference_seconds",
    "opening s": "opening_seconds",
    "network s": "network_seconds",
    "total s": "total_seconds",
    "ratio": "ratio",
}
"""Title of a column -> key of what `latency` returns."""
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


def methods(scale: Scale, task: str) -> dict[str, Cell]:
    """Returns the cells of a task's column, by method."""
    trained = {"LoRA": "lora", "Adapter": "adapter", "LST": "s2", "SPA": "spa"}
    found = {name: short_training(scale, task, setting) for name, setting in trained.items()}
    return {name: cell_of(training, "s3" if name == "LST" else None) for name, training in found.items()}


def cells(scale: Scale) -> list[Cell]:
    """Returns the cells of all methods and tasks."""
    return [cell for task in scale.table2 for cell in methods(scale, task).values()]


def latency(store: CellStore, name: str) -> dict[str, Any] | None:
    """Returns seconds and exchanges of 50 tokens, measured once and kept; None where they are not and may not be."""
    path = store.results / "latency" / f"{METHODS[name]}.json"
    kept = store.kept(path)
    if kept is not None or not store.may_run:
        return kept
    task = store.scale.table2[0]
    cell = methods(store.scale, task)[name]
    training, setting = cell.training, cell.changes.get("setting")
    assert training is not None
    config = store.config(training, LEARNING_RATES[0])  # the rate matters only to a training
    encoder, backbone = make_encoder(store.backbone, config.data), dataclasses.replace(store.backbone, eos_ids=())
    prompts = questions(encoder, config.data)
    trained: Any = untrained(config, backbone, encoder.template)
    if trained.config.routed and setting is None:
        trained = load_trained(store.train(training) / "plugin")
    cloud = Cloud(backbone)

    def answer(prompt: list[int]) -> tuple[float, Traffic]:
        began = time.perf_counter()
        if trained.config.side is None:
            device = LayerwiseDevice(Peft(trained.config, trained.params), backbone.config, "bfloat16")
            channel = Simulated(device.answer, Network())
            traffic = LayerwiseCloud(backbone, trained.config, "bfloat16", channel).generate(prompt, TOKENS + 1)[1]
        else:
            request = open_message(trained, [prompt], TOKENS, "bfloat16", setting)
            traffic = generate(cloud, trained, request, functools.partial(Simulated, network=Network())).traffic
        return time.perf_counter() - began, traffic

    for prompt in prompts:
        answer(prompt)  # compiles
    seconds, traffics = zip(*map(answer, prompts))
    inference = statistics.median(seconds)
    network, opening = (
        statistics.median(getattr(traffic, name) for traffic in traffics)
        for name in ("network_seconds", "opening_seconds")
    )
    found = {
        "hardware": hardware(),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "inference_seconds": inference,
        "opening_seconds": opening,
        "network_seconds": network,
        "total_seconds": total_seconds(0.0, inference, network),
        "ratio": statistics.median(traffic.exchanges / TOKENS for traffic in traffics),
        "bytes": statistics.median(traffic.bytes_down + traffic.bytes_up for traffic in traffics),
    }
    write_json(path, found)
    return found


def questions(encoder: Encoder, config: DataConfig) -> list[list[int]]:
    """Returns the prompts of the first questions of the test split."""
    examples, _ = encoder.encode_all(load_split(config.task, config.directory, "test")[:QUESTIONS])
    return [example.prompts[0] for example in examples]


def untrained(config: RunConfig, backbone: Backbone, template: str) -> Trained:
    """Returns what a run starts from: as large and as fast as what it ends with."""
    recipe = recipe_from_config(config, backbone.config)
    params = recipe.method_params(recipe.init_params(backbone))
    return recipe.trained(recipe.method.threshold, params, backbone, template)


def report(store: CellStore) -> None:
    rows: Rows = {}
    for name, paper in PAPER.items():
        percent, inference, *others = paper
        times = inference, None, *others  # the paper has no opening
        measured, columns = latency(store, name), {"% param": TableEntry(None, paper=percent)}
        columns |= {column: entry(measured, key, said) for (column, key), said in zip(MEASURED.items(), times)}
        for task in store.scale.table2:
            cell = methods(store.scale, task)[name]
            assert cell.training is not None
            columns["% param"] = entry(store.summary(cell.training), "params/trainable_percent", percent)
            columns[TITLES[task]] = entry(store.result(cell), "score/rougeL", PAPER_SCORES[name].get(task))
        rows[name] = columns
    notes = [
        f"Medians over {QUESTIONS} questions, EOS not heeded. Inference holds the prompt too, which costs every method "
        "the same backbone pass. The ratio is of exchanges to tokens; the cloud asks LoRA's device once a layer and "
        "Adapter's twice.",
    ]
    write(store, "table2", "table2", "Table 2: 50 tokens by each method", rows, notes)


if __name__ == "__main__":
    run_report(report)
