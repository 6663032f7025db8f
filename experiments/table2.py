"""Table 2: what 50 new tokens take with each method, and ROUGE-L beside LoRA and Adapter.

    python -m experiments.table2 --scale=mini --data=DIR

Times are of one prompt, by the method's own programs over a simulated link of the paper's 3.82 ms and 1 Gbit/s, on a
virtual clock: inference is what cloud and device compute here, network is equation 6, and total their sum (equation 4).
LoRA and Adapter ask the device at every layer, so their programs run layer by layer. SPA's and LST's taps travel as
bfloat16, all methods are trained on the same rows, lengths and epochs.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

from experiments.ablation import hardware
from experiments.cells import Bench, Cell, Training
from experiments.report import Entry, main_of, number, score, write
from experiments.scales import TITLES, Scale
from spa_jax.files import write_json
from spa_jax.models.peft import Peft
from spa_jax.split.channel import Traffic
from spa_jax.split.generation import generate, open_message
from spa_jax.split.latency import total_seconds
from spa_jax.split.layerwise import LayerwiseCloud, LayerwiseDevice
from spa_jax.split.session import Cloud
from spa_jax.split.simulated import Network, Simulated
from spa_jax.weights.peft import PeftPlugin, load_trained
from spa_jax.weights.plugin import Plugin

TOKENS, PROMPT, REPEATS = 50, 64, 3
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
    plugin = load_trained(bench.train(training) / "plugin")
    backbone = dataclasses.replace(bench.backbone, eos_ids=())
    cloud = Cloud(backbone)
    prompt = list(range(100, 100 + PROMPT))

    def run() -> Traffic:
        if isinstance(plugin, PeftPlugin):
            device = LayerwiseDevice(Peft(plugin.config, plugin.params), backbone.config, "bfloat16")
            channel = Simulated(device.answer, Network())
            return LayerwiseCloud(backbone, plugin.config, "bfloat16", channel).generate(prompt, TOKENS + 1)[1]
        assert isinstance(plugin, Plugin)
        request = open_message(plugin, [prompt], TOKENS, "bfloat16", "s3" if METHODS[name] == "s3" else None)
        return generate(cloud, plugin, request, functools.partial(Simulated, network=Network())).traffic

    run()  # compiles
    computed, traffics = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        traffics.append(run())
        computed.append(time.perf_counter() - began)
    inference, network = statistics.median(computed), traffics[-1].network_seconds
    found = {
        "hardware": hardware(),
        "inference_seconds": inference,
        "network_seconds": network,
        "total_seconds": total_seconds(0.0, inference, network),
        "ratio": traffics[-1].exchanges / TOKENS,
        "bytes": traffics[-1].bytes_down + traffics[-1].bytes_up,
    }
    write_json(path, found)
    return found


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
        "Inference holds the prompt of 64 tokens too, which costs every method the same backbone pass. The ratio is of "
        "exchanges to tokens; the cloud asks LoRA's device once a layer and Adapter's twice.",
    ]
    write(bench, "table2", "Table 2: 50 tokens by each method", rows, notes, plot=False)


if __name__ == "__main__":
    main_of(report)
