"""LoRA and Adapter, the baselines that train through the frozen backbone, and add to outputs within every block.

LoRA (Hu et al. 2022) adds (alpha / r) x A B to a linear map's output, x being its input. Adapter (Houlsby et al. 2019)
adds relu(y A + a) B + b to the output y of attention and of the feed-forward layer, before the residual addition. In
both B starts at zero, so a fresh one equals the base. There is no dropout.

Shape letters: B batch, T tokens, L blocks, D backbone width, E rank of LoRA or width of the Adapter's bottleneck.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spa_jax.models.block import LlamaConfig
from spa_jax.models.llama import Params
from spa_jax.models.method import Method
from spa_jax.models.plugin import count_params

PeftSetting = Literal["lora", "adapter"]
PEFT_SETTINGS: tuple[PeftSetting, ...] = get_args(PeftSetting)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Linear maps of a block that LoRA may add to."""
SUBLAYERS = ("attention", "mlp")
"""Sublayers of a block whose outputs an Adapter adds to."""


@dataclasses.dataclass(frozen=True)
class PeftConfig(Method):
    """The shape of a LoRA or Adapter: everything but its parameters.

    Attributes:
        setting: which of the two.
        rank: E. On LLaMA-7B, LoRA of rank 24 on queries and values has 0.19 % of the backbone's parameters and Adapter
            of width 48 has 0.38 %, the paper's numbers.
        alpha: scale of a LoRA, whose sum is multiplied by alpha / rank.
        targets: linear maps that a LoRA adds to, some of `TARGETS`.
    """

    setting: PeftSetting
    rank: int
    alpha: float = 1.0
    targets: tuple[str, ...] = ("q", "v")

    threshold, side, taps, routed = 0.0, None, (), False  # there is no side network and no router

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the places in a block that get something added."""
        return self.targets if self.setting == "lora" else SUBLAYERS

    def init_params(self, backbone: LlamaConfig, seed: int = 0) -> Params:
        return init_peft(self, backbone, seed)

    def runs_as(self, setting: str) -> bool:
        return setting in (self.setting, "base")

    def block_adapter(self, params: Params) -> "Peft":
        return Peft(self, params)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class Peft:
    """A LoRA or Adapter with its parameters, a `ForwardHook` and a pytree: its leaves have the L blocks first."""

    config: PeftConfig
    params: Params

    def __call__(self, name: str, x: Float[Array, "B T ..."], y: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Adds to y, the output of a named place in a block for the input x, what belongs there."""
        if name not in self.params:
            return y
        return y + added(self.config, self.params[name], x.reshape(*x.shape[:2], -1)).reshape(y.shape)


def added(config: PeftConfig, factors: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """Computes what one LoRA or Adapter adds, in the dtype of x; I and O are the widths of its place."""
    inner = x @ factors["a"].astype(x.dtype)
    if config.setting == "lora":
        return config.alpha / config.rank * (inner @ factors["b"].astype(x.dtype))
    inner = jax.nn.relu(inner + jnp.broadcast_to(factors["a_bias"], inner.shape).astype(x.dtype))
    out = inner @ factors["b"].astype(x.dtype)
    return out + jnp.broadcast_to(factors["b_bias"], out.shape).astype(x.dtype)


def widths(name: str, backbone: LlamaConfig) -> tuple[int, int]:
    """Returns the input and output width of a place in a block."""
    c = backbone
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    into = {"o": queries, "down": c.intermediate_size}
    out_of = {"q": queries, "k": keys, "v": keys, "gate": c.intermediate_size, "up": c.intermediate_size}
    return into.get(name, c.hidden_size), out_of.get(name, c.hidden_size)


def init_peft(config: PeftConfig, backbone: LlamaConfig, seed: int = 0, abstract: bool = False) -> Params:
    """Fresh float32 parameters `{place: {"a": [L,I,E], "b": [L,E,O]}}`, of an Adapter `"a_bias"` and `"b_bias"` too;
    with `abstract`, their shapes and dtypes only.

    A is uniform within 1 / sqrt(I) of zero, as in LoRA's reference implementation, and all else zero.
    """
    return _init.eval_shape(config, backbone, seed) if abstract else _init(config, backbone, seed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(config: PeftConfig, backbone: LlamaConfig, seed: int) -> Params:
    params, keys = {}, jax.random.split(jax.random.key(seed), len(config.places))
    for key, name in zip(keys, config.places):
        layers, (into, out) = backbone.num_layers, widths(name, backbone)
        bound = into**-0.5
        params[name] = {
            "a": jax.random.uniform(key, (layers, into, config.rank), minval=-bound, maxval=bound),
            "b": jnp.zeros((layers, config.rank, out)),
        }
        if config.setting == "adapter":
            params[name] |= {"a_bias": jnp.zeros((layers, config.rank)), "b_bias": jnp.zeros((layers, out))}
    return params


def rank_for(config: PeftConfig, backbone: LlamaConfig, wanted: int) -> PeftConfig:
    """Returns the config with the rank, at least 1, whose number of parameters is nearest to `wanted`; LoRA's scale
    alpha / rank is kept."""

    def count(rank: int) -> int:
        return count_params(init_peft(dataclasses.replace(config, rank=rank), backbone, abstract=True))

    each = count(2) - count(1)
    rank = max(1, round((wanted - (count(1) - each)) / each))
    return dataclasses.replace(config, rank=rank, alpha=config.alpha / config.rank * rank)
