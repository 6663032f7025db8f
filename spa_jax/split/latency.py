"""The latency of a generation: equations 4 to 6 of the paper, and their constants from measurements.

All times are in seconds, sizes in bytes, bandwidths in bits per second, and one FLOP is one addition or multiplication.
"""

from collections.abc import Sequence

import numpy as np

from spa_jax.errors import UserError
from spa_jax.models.plugin import PluginConfig
from spa_jax.split.channel import Traffic
from spa_jax.split.simulated import Network


def network_seconds(traffic: Traffic, network: Network) -> float:
    """Equation 6, T_net = M (tau + T_data), summed over the new tokens of a generation: its exchanges are M times its
    tokens, and T_data is the time of the bytes down and up. What came before, as to correct a prompt, is counted apart
    (`Traffic.opening_seconds`)."""
    return traffic.exchanges * network.tau + 8 * (traffic.bytes_down / network.down + traffic.bytes_up / network.up)


def device_seconds(flops: float, flops_per_second: float, processors: int = 1) -> float:
    """Equation 5, T_on-devices = F_data C_devices / f^e.

    As printed, C multiplies: it is how many processors do the same work one after the other, 1 on a device that has one
    side network.

    Args:
        flops: F_data, floating-point operations of the device's part.
        flops_per_second: f^e of one processor.
        processors: C_devices.
    """
    return flops * processors / flops_per_second


def total_seconds(device: float, pretrained: float, network: float) -> float:
    """Equation 4, T_total = T_on-devices + T_pretrained + T_net."""
    return device + pretrained + network


def side_flops(config: PluginConfig, context_length: int = 1) -> int:
    """Counts the FLOPs of one correction: two for each weight of a matrix, and for a side network that attends the
    products with the keys and values of `context_length` positions, its own among them. Norms, gates and activations
    are left out."""
    d, e, taps = config.hidden_size, config.side.width, len(config.side.taps)
    ends = taps * d * e + e * d
    if not config.side.attends:
        return 2 * (ends + 2 * (taps - 1) * d * e)
    block = config.side.block
    matrices = 4 * e * e + 3 * e * block.intermediate_size
    return 2 * (ends + taps * matrices) + taps * 4 * e * context_length


def fit_network(sizes: Sequence[float] | np.ndarray, seconds: Sequence[float] | np.ndarray) -> Network:
    """Fits tau and bandwidth of equation 6 to measured exchanges by least squares.

    Args:
        sizes: bytes of each exchange, down and up together.
        seconds: how long each took, the device's computing left out.

    Raises:
        UserError: fewer than two sizes, or times that do not grow with them.
    """
    x, y = 8 * np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    if len(np.unique(x)) < 2:
        raise UserError("to fit tau and bandwidth takes exchanges of at least two sizes")
    per_bit, tau = np.polyfit(x, y, 1)
    if per_bit <= 0:
        raise UserError("the measured exchanges do not take longer the larger they are: measure more, or larger ones")
    return Network(tau=max(float(tau), 0.0), down=float(1 / per_bit), up=float(1 / per_bit))
