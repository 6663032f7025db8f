"""The network column of the paper's Table 2, counted from the real programs.

    python -m experiments.benchmarks.table2_network

Every method generates 50 tokens over a simulated link of 3.82 ms and 1 Gbit/s, with its own programs, on a backbone of
32 random blocks that is 1/128 as wide as LLaMA-7B; the bytes of arrays are counted 128 times. Prompts are not counted.
SPA has a random router and the threshold at which it asks for 31 of the 50 tokens, the paper's ratio of 0.62.
"""

import numpy as np

from experiments.benchmarks.output import output_path
from experiments.record import print_table
from spa_jax import command
from spa_jax.files import write_json
from spa_jax.models.block import LlamaConfig
from spa_jax.models.combine import Setting
from spa_jax.models.llama import init_params
from spa_jax.models.peft import Peft, PeftConfig, PeftSetting, init_peft
from spa_jax.models.plugin import PluginConfig, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.split.channel import Answer, Traffic
from spa_jax.split.generation import generate
from spa_jax.split.latency import network_seconds
from spa_jax.split.layerwise import LayerwiseCloud, LayerwiseDevice
from spa_jax.split.messages_pb2 import Layer, Reply, Taps
from spa_jax.split.request import open_message
from spa_jax.split.session import Cloud
from spa_jax.split.simulated import Network, Simulated
from spa_jax.split.wire import Codec
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin

LAYERS, WIDTH, LLAMA_7B_WIDTH = 32, 32, 4096
SCALE = LLAMA_7B_WIDTH // WIDTH
NEW, ASKED = 50, 31
PAPER = {"lora": 6.37, "adapter": 12.56, "lst": 0.31, "spa": 0.18}
"""Seconds for 50 tokens, Table 2."""
NETWORK = Network()
PROMPT = [1, 2, 3, 4, 5]


class ScaledLink(Simulated):
    """A simulated link on which arrays are `SCALE` times as large as they are; their scales are not."""

    def __init__(self, answer: Answer, layers: bool = False) -> None:
        super().__init__(answer, NETWORK)
        self._layers = layers

    def exchange(self, message: bytes) -> bytes | None:
        reply = super().exchange(message)
        assert reply is not None
        down = Layer.FromString(message).x if self._layers else Taps.FromString(message).taps
        more = (SCALE - 1) * len(down.values), (SCALE - 1) * len(Reply.FromString(reply).g.values)
        self.traffic.bytes_down += more[0]
        self.traffic.bytes_up += more[1]
        self.traffic.network_seconds += 8 * (more[0] / NETWORK.down + more[1] / NETWORK.up)
        return reply


def random_plugin(setting: Setting, taps: tuple[int, ...]) -> Plugin:
    """Makes a random plugin, so that the router is of two minds and g says something."""
    config = PluginConfig(setting, SideConfig("tokenwise", 4, taps), WIDTH)
    rng = np.random.default_rng(0)
    shapes = init_plugin(config, abstract=True)
    params = {
        part: {name: 0.3 * rng.standard_normal(leaf.shape, np.float32) for name, leaf in leaves.items()}
        for part, leaves in shapes.items()
    }
    return Plugin(config, params, "random", "0" * 32, "plain")


def count_spa(backbone: Backbone, setting: Setting, taps: tuple[int, ...], codec: Codec) -> Traffic:
    """Counts the traffic of 50 tokens; in `spa` with 31 of them asked for."""
    plugin, cloud = random_plugin(setting, taps), Cloud(backbone)

    def run(threshold: float) -> Traffic:
        request = open_message(plugin, [PROMPT], NEW, codec, threshold=threshold)
        return generate(cloud, plugin, request, ScaledLink).traffic

    if setting != "spa":
        return run(0.5)
    for threshold in np.linspace(0.2, 0.8, 241):
        traffic = run(float(threshold))
        if traffic.exchanges == ASKED:
            return traffic
    raise RuntimeError("no threshold asks for 31 of the 50 tokens")


def count_layers(backbone: Backbone, method: PeftSetting) -> Traffic:
    """Counts the traffic of 50 tokens after the first, which comes with the prompt."""
    config = PeftConfig(method, 2)
    device = LayerwiseDevice(Peft(config, init_peft(config, backbone.config)), backbone.config, "bfloat16")
    channel = ScaledLink(device.answer, layers=True)
    _, traffic = LayerwiseCloud(backbone, config, "bfloat16", channel).generate(PROMPT, NEW + 1)
    return traffic


def main() -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=WIDTH, intermediate_size=48, num_layers=LAYERS, num_heads=4, num_kv_heads=4,
        head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    params = init_params(config)
    backbone = Backbone("random", config, params, None, (), "0" * 32)  # type: ignore[arg-type]
    every, six = tuple(range(LAYERS + 1)), tuple(range(2, LAYERS + 1, 6))
    traffics = {
        "lora": count_layers(backbone, "lora"),
        "adapter": count_layers(backbone, "adapter"),
        "lst": count_spa(backbone, "s3", every, "bfloat16"),
        "spa": count_spa(backbone, "spa", every, "bfloat16"),
        "spa, six taps as int8": count_spa(backbone, "spa", six, "int8"),
    }
    rows, cells = {}, []
    for name, traffic in traffics.items():
        seconds, total = traffic.network_seconds, traffic.bytes_down + traffic.bytes_up
        assert np.isclose(seconds, network_seconds(traffic, NETWORK)), "the virtual clock is equation 6"
        rows[name] = {
            "exchanges": traffic.exchanges, "bytes": total, "bytes_down": traffic.bytes_down,
            "bytes_up": traffic.bytes_up, "network_seconds": seconds, "paper_network_seconds": PAPER.get(name),
        }  # fmt: skip
        cells.append((name, f"{traffic.exchanges}", f"{total:,}", f"{seconds:.3f}", str(PAPER.get(name, ""))))
    print_table(("method", "exchanges", "bytes", "network seconds", "paper"), cells)
    link = {"tau_seconds": NETWORK.tau, "bits_per_second": NETWORK.down}
    said = {"command": "python -m experiments.benchmarks.table2_network", "hardware": "none: counted"}
    write_json(output_path("table2_network"), {**said, "network": link, "rows": rows})


if __name__ == "__main__":
    command.run(main)
