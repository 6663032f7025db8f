"""The trainable half: side network and router of one setting, over a backbone of width D."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spa_jax.errors import UserError
from spa_jax.models.block import Cache, CachePlacement, LlamaConfig
from spa_jax.models.combine import ADDED, ROUTED, Edits, Setting
from spa_jax.models.llama import Entry, Params
from spa_jax.models.method import Method
from spa_jax.models.router import Router
from spa_jax.models.side import SideConfig, TokenwiseSide, TransformerSide


@dataclasses.dataclass(frozen=True)
class PluginConfig(Method):
    """The shape of a side plugin: everything but its parameters `{"side": ..., "router": ...}`.

    Attributes:
        setting: `spa`, `s1`, `s2` or `s3`.
        side: the side network's shape.
        hidden_size: D of the backbone.
        threshold: the device is asked where p(consult) is above it.
        offset: whether the router has a constant `[D]` that the cloud adds to f where the device is not asked. The
            paper's has none.
        entry: where g meets the residual stream. In front of a block, g and the offset are in units of the RMS of the
            state there, and no tap is above it.
        edits: which positions are corrected; for `head` always `targets`.
    """

    setting: Setting
    side: SideConfig
    hidden_size: int
    threshold: float = 0.5
    offset: bool = False
    entry: Entry = "head"
    edits: Edits = "targets"

    @property
    def taps(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.side.taps

    @property
    def routed(self) -> bool:  # type: ignore[override]
        return self.setting in ROUTED

    def init_params(self, backbone: LlamaConfig, seed: int = 0) -> Params:
        return init_plugin(self, seed)

    def runs_as(self, setting: str) -> bool:
        """Tells whether g was trained for it, added to f or in its place, and there is a router where it needs one."""
        same_correction = (setting in ADDED) == (self.setting in ADDED)
        return setting == "base" or (same_correction and (self.routed or setting not in ROUTED))


def side_network(config: PluginConfig, dtype: DTypeLike = jnp.float32) -> TokenwiseSide | TransformerSide:
    """The side network's module; g starts at zero where it is added to f, so that a fresh plugin equals the base."""
    kind = TransformerSide if config.side.attends else TokenwiseSide
    return kind(config.side, config.hidden_size, zero_output=config.setting in ADDED, dtype=dtype)


def correction(
    config: PluginConfig,
    params: Params,
    taps: Float[Array, "P B T D"],
    positions: Int[Array, "B T"],
    cache: Cache | None = None,
    dtype: DTypeLike = jnp.float32,
    places: CachePlacement | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Computes g from normalised taps at their positions, and returns it with the cache that these were added to.

    The token-wise kind uses neither positions nor cache, and returns the cache as it is. The transformer kind sees the
    given positions and, with a cache of its own (`init_cache` of `config.side.block`), the ones before, by position or
    as `places` say.
    """
    network, variables = side_network(config, dtype), {"params": params["side"]}
    if config.side.attends:
        return network.apply(variables, taps, positions, cache, places)
    return network.apply(variables, taps), cache


def router_logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... 2"]:
    """Computes the router's logits from the normalised state at the entry."""
    return Router().apply({"params": params["router"]}, hidden)


def offset_of(params: Params) -> Float[Array, " D"] | None:
    """The router's constant, where it has one."""
    return params.get("router", {}).get("offset")


def init_plugin(config: PluginConfig, seed: int = 0, abstract: bool = False, random_router: bool = False) -> Params:
    """Fresh float32 parameters `{"side": ..., "router": ...}`; with `abstract`, their shapes and dtypes only.

    The router starts at zero, p(consult) = 0.5, or at random for an objective that would never leave zero.
    """
    arguments = (config, seed, random_router)
    return _init.eval_shape(*arguments) if abstract else _init(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(config: PluginConfig, seed: int, random_router: bool) -> Params:
    taps = jnp.zeros((len(config.side.taps), 1, 1, config.hidden_size))
    positions = (jnp.zeros((1, 1), jnp.int32),) if config.side.attends else ()
    params = {"side": side_network(config).init(jax.random.key(seed), taps, *positions)["params"]}
    if config.routed:
        params["router"] = Router(random_router).init(jax.random.key(seed), taps[0])["params"]
        if config.offset:
            params["router"]["offset"] = jnp.zeros(config.hidden_size)
    return params


def parse_entry(text: str, backbone: LlamaConfig) -> Entry:
    """Reads the entry of a config: `middle`, `head`, or the index of a block.

    Raises:
        UserError: the backbone has no such block.
    """
    if text == "head":
        return "head"
    if text == "middle":
        return (backbone.num_layers - 1) // 2
    if text.isdecimal() and int(text) < backbone.num_layers:
        return int(text)
    raise UserError(
        f"side.entry is '{text}': write 'middle', 'head', or the index of a block, 0 to {backbone.num_layers - 1}, in "
        "front of which corrections enter"
    )


def count_params(params: Params) -> int:
    """Number of scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def select_taps(spec: str, backbone: LlamaConfig, entry: Entry = "head") -> tuple[int, ...]:
    """The tap list a config asks for.

    Args:
        spec: `all`; `every:K`, that is e, e - K, ... down to at least 0; `last:K`; or indices such as `0,6,12`.
        backbone: gives L.
        entry: gives e, which is L for `head`.

    Raises:
        UserError: the text is no tap list of this backbone.
    """
    last = backbone.num_layers if entry == "head" else entry
    word, _, count = spec.partition(":")
    if word == "all" and not count:
        return tuple(range(last + 1))
    if word in ("every", "last") and count.isdecimal() and int(count) > 0:
        return tuple(range(last, -1, -int(count)))[::-1] if word == "every" else tuple(range(last + 1))[-int(count) :]
    indices = spec.split(",")
    if all(index.isdecimal() for index in indices):
        taps = tuple(int(index) for index in indices)
        if list(taps) == sorted(set(taps)) and taps[-1] <= last:
            return taps
    raise UserError(
        f"side.taps is '{spec}': write 'all', 'every:K', 'last:K', or ascending indices up to {last} such as '0,{last}'"
    )
