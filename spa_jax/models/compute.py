"""How a backbone computes: attention kernel, unrolling, and precision of weights."""

import dataclasses
from typing import Literal, get_args

from spa_jax.errors import UserError

Kernel = Literal["auto", "xla", "blockwise", "splash", "cudnn"]
Weights = Literal["float", "int8"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)


@dataclasses.dataclass(frozen=True)
class Compute:
    """Choices of speed and memory, the config keys `compute.*`.

    Attributes:
        attention: the kernel that runs many tokens at once, see `spa_jax.models.attention`; `auto` is the best of the
            platform.
        unroll: blocks in one turn of the loop over them; more of them compile longer, and on a CPU XLA copies their
            weights before a turn, which slows generation.
        weights: `int8` keeps the backbone's matrices in 8 bits with a scale for each output channel, see
            `spa_jax.models.quantized`, and changes what it says a little.
    """

    attention: Kernel = "auto"
    unroll: int = 1
    weights: Weights = "float"

    def __post_init__(self) -> None:
        if self.unroll < 1:
            raise UserError(f"compute.unroll is {self.unroll}, but must be 1 or more")


AUTOMATIC = Compute()
