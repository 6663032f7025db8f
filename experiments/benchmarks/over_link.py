"""Generations by a cloud on one host and a device on another, and what the network between them took."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks.hosts import CLOUD, DEVICE, Link, inside, two_hosts
from spa_jax.split.channel import Traffic
from spa_jax.split.cloud_process import cloud_process
from spa_jax.split.latency import network_seconds
from spa_jax.split.simulated import Network


def over_link(
    link: Link, backbone: str, plugin: Path, prompts: list[str], new: int, codec: str = "float32"
) -> list[dict[str, Any]]:
    """Runs generations by a cloud on one host and a device on another, one after the other.

    Raises:
        UserError: hosts are not permitted here.
    """
    rows = []
    with two_hosts(link), tempfile.TemporaryDirectory() as name:
        log, output = Path(name) / "log", Path(name) / "output"
        serves = (f"--host={CLOUD}", "--insecure", "--deadline=60")
        with cloud_process(backbone, *serves, log=log, inside=inside(CLOUD)) as cloud:
            for prompt in prompts:
                asks = (
                    f"--plugin={plugin}", f"--cloud={CLOUD}:{cloud.port}", "--insecure", f"--prompt={prompt}",
                    f"--max_new_tokens={new}", f"--codec={codec}", f"--output={output}",
                )  # fmt: skip
                device = inside(DEVICE, sys.executable, "-m", "spa_jax.serve", "device", *asks)
                subprocess.run(device, check=True, capture_output=True)
                said = json.loads(output.read_text(encoding="utf-8"))
                out = float(re.findall(r"([\d.]+) s of questions being out", log.read_text(encoding="utf-8"))[-1])
                counted = {key: said[key] for key in ("exchanges", "bytes_down", "bytes_up", "degraded")}
                traffic = Traffic(said["exchanges"], 0, said["bytes_down"], said["bytes_up"])
                rows.append(
                    {
                        "round_trip": link.round_trip,
                        "loss": link.loss,
                        "congestion": link.congestion,
                        "codec": codec,
                        "tokens": said["tokens"],
                        **counted,
                        "measured_seconds": out - said["device_seconds"],
                        "predicted_seconds": network_seconds(traffic, Network(link.round_trip, link.rate, link.rate)),
                    }
                )
    return rows
