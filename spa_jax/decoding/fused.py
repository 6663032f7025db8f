"""Generation with backbone, side network and router in one process: the reference for the split one.

Shape letters: B rows, T prompt tokens, N most new tokens, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from spa_jax.data.pipeline import bucket
from spa_jax.decoding.cache import init_cache
from spa_jax.decoding.sampling import GREEDY, Sampling, sample
from spa_jax.errors import UserError
from spa_jax.models.combine import ADDED, ROUTED, SETTINGS, Setting, combine
from spa_jax.models.llama import Cache, Llama, LlamaOutput, Params, normalize_taps, positions_from_mask
from spa_jax.models.plugin import PluginConfig, correction, router_logits
from spa_jax.models.router import consult
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Plugin


class DecodeState(NamedTuple):
    """A generation under way; every leaf but `made` and `key` has the batch first."""

    cache: Cache
    side_cache: Cache | None
    """Of a side network that attends; what a device would keep."""
    position: Int[Array, " B"]
    """Where the newest token will be run."""
    tokens: Int[Array, "B N"]
    """New tokens, of which `made` are there; after a row's EOS they mean nothing."""
    sources: Bool[Array, "B N"]
    """True where the device was asked for the token."""
    done: Bool[Array, " B"]
    """Whether the row has ended with EOS."""
    made: Int[Array, ""]
    key: PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of one row, EOS included where it was reached, and for each whether the device was asked."""

    tokens: list[int]
    consulted: list[bool]

    @property
    def consulted_share(self) -> float:
        """Share of the tokens, EOS included, for which the device was asked."""
        return sum(self.consulted) / max(len(self.consulted), 1)


class FusedModel:
    """A backbone with an optional plugin, ready to generate."""

    def __init__(
        self, backbone: Backbone, plugin: Plugin | None, setting: Setting | None = None, threshold: float | None = None
    ) -> None:
        """Args:
            backbone: the frozen model.
            plugin: None for the backbone alone.
            setting: what enters the LM head; by default the plugin's own. `base`, and `s1` of a plugin trained as `spa`
            or
                `s3` of one trained as `s2`, need nothing the plugin does not have.
            threshold: the device is asked where p(consult) is above it; by default the plugin's own.

        Raises:
            UserError: the plugin is of another backbone, or cannot run in that setting.
        """
        if plugin is None:
            setting = setting or "base"
            if setting != "base":
                raise UserError(f"setting '{setting}' needs a plugin: name one with --plugin")
        else:
            plugin.check(backbone)
            setting = setting or plugin.config.setting
            _check_setting(setting, plugin.config)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"threshold is {threshold}, but must lie between 0 (always ask) and 1 (never ask)")
        self.backbone, self.plugin, self.setting = backbone, plugin, setting
        self.threshold = threshold if threshold is not None else (plugin.config.threshold if plugin else 0.5)
        taps = plugin.config.side.taps if plugin and setting != "base" else ()
        dtype = jax.tree.leaves(backbone.params)[0].dtype
        self.model = Llama(backbone.config, taps, dtype)
        self._prefill = jax.jit(self._run_prompt, static_argnames=("slots", "room"))
        self._advance = jax.jit(self._run_tokens, donate_argnums=(2,))

    def start(self, prompts: Sequence[Sequence[int]], room: int, sampling: Sampling, seed: int) -> DecodeState:
        """Runs the prompts and chooses the first new token of each, with room for `room` new tokens.

        Raises:
            UserError: a prompt is empty or leaves no room in the backbone's context.
        """
        longest = max(len(prompt) for prompt in prompts)
        limit = self.backbone.config.max_position_embeddings
        if not all(prompts):
            raise UserError("a prompt is empty: it needs at least one token")
        if room < 1 or longest + room > limit:
            raise UserError(
                f"the prompt of {longest} tokens and {room} new ones do not fit the backbone's context of {limit}: "
                "shorten the prompt or change --max_new_tokens"
            )
        width = bucket(longest, 32)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        slots, key = bucket(longest + room, 64), jax.random.key(seed)
        frozen, trainable = self._params
        return self._prefill(frozen, trainable, tokens, lengths, key, sampling, self.threshold, slots=slots, room=room)

    def advance(self, state: DecodeState, sampling: Sampling, until: int) -> DecodeState:
        """Goes on in one jitted loop until `until` new tokens are there or every row is done; the state is donated."""
        frozen, trainable = self._params
        return self._advance(frozen, trainable, state, sampling, self.threshold, until)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> list[Generation]:
        """Generates for each prompt of token ids, up to its EOS or `max_new_tokens`."""
        state = self.start(prompts, max_new_tokens, sampling, seed)
        state = self.advance(state, sampling, max_new_tokens)
        tokens, sources, count = jax.device_get((state.tokens, state.sources, state.made))
        return [self._cut(tokens[row, :count], sources[row, :count]) for row in range(len(prompts))]

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[tuple[int, bool]]:
        """Yields (token, whether the device was asked) of one prompt as they come, EOS included."""
        state = self.start([prompt], max_new_tokens, sampling, seed)
        for count in range(max_new_tokens):
            token, source, done = jax.device_get((state.tokens[0, count], state.sources[0, count], state.done[0]))
            yield int(token), bool(source)
            if done:
                return
            if count + 1 < max_new_tokens:
                state = self.advance(state, sampling, count + 2)

    @property
    def _params(self) -> tuple[Params, Params]:
        return self.backbone.params, self.plugin.params if self.plugin else {}

    def _cut(self, tokens: np.ndarray, sources: np.ndarray) -> Generation:
        ends = np.flatnonzero(np.isin(tokens, self.backbone.eos_ids))
        length = ends[0] + 1 if len(ends) else len(tokens)
        return Generation(tokens[:length].tolist(), sources[:length].tolist())

    def _correct(
        self,
        frozen: Params,
        trainable: Params,
        out: LlamaOutput,
        positions: jax.Array,
        side_cache: Cache | None,
        last: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """f and g `[B,1,D]` at index `last` `[B]` of each row's tokens, and the side network's cache."""
        index = last[:, None, None]
        hidden = jnp.take_along_axis(out.hidden, index, axis=1)
        if self.plugin is None or self.setting == "base":
            return hidden, jnp.zeros_like(hidden), side_cache
        config, taps = self.plugin.config, out.taps
        if not config.side.attends:
            taps, positions = jnp.take_along_axis(taps, index[None], axis=2), last[:, None]
        taps = normalize_taps(frozen, self.backbone.config, self.model.taps, taps)
        g, side_cache = correction(config, trainable, taps, positions, side_cache, self.model.dtype)
        return hidden, jnp.take_along_axis(g, index, axis=1) if config.side.attends else g, side_cache

    def _choose(
        self,
        frozen: Params,
        trainable: Params,
        hidden: jax.Array,
        g: jax.Array,
        key: jax.Array,
        sampling: Sampling,
        threshold: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The next token from f and g `[B,1,D]`, whether the device was asked, and whether it is EOS."""
        if self.setting in ROUTED:
            sigma = consult(router_logits(trainable, hidden), threshold)
        else:
            sigma = jnp.full(hidden.shape[:2], self.setting != "base")
        state = combine(self.setting, hidden, g, sigma)
        logits = self.model.apply({"params": frozen}, state[:, 0], method="logits")
        token = sample(key, logits, sampling)
        return token, sigma[:, 0], jnp.isin(token, jnp.array(self.backbone.eos_ids, jnp.int32))

    def _run_prompt(
        self,
        frozen: Params,
        trainable: Params,
        tokens: jax.Array,
        lengths: jax.Array,
        key: jax.Array,
        sampling: Sampling,
        threshold: jax.Array,
        *,
        slots: int,
        room: int,
    ) -> DecodeState:
        rows, width = tokens.shape
        positions = positions_from_mask(jnp.arange(width, dtype=jnp.int32)[None, :] < lengths[:, None])
        cache = init_cache(self.backbone.config, rows, slots, self.model.dtype)
        attends = self.plugin is not None and self.setting != "base" and self.plugin.config.side.attends
        side_cache = None
        if attends and self.plugin is not None:
            side_cache = init_cache(self.plugin.config.side.block, rows, slots, self.model.dtype)
        out: LlamaOutput = self.model.apply({"params": frozen}, tokens, positions, cache)
        hidden, g, side_cache = self._correct(frozen, trainable, out, positions, side_cache, lengths - 1)
        choose_key, key = jax.random.split(key)
        token, source, done = self._choose(frozen, trainable, hidden, g, choose_key, sampling, threshold)
        new = jnp.zeros((rows, room), jnp.int32).at[:, 0].set(token)
        sources = jnp.zeros((rows, room), bool).at[:, 0].set(source)
        assert out.cache is not None
        return DecodeState(out.cache, side_cache, lengths, new, sources, done, jnp.int32(1), key)

    def _run_tokens(
        self,
        frozen: Params,
        trainable: Params,
        state: DecodeState,
        sampling: Sampling,
        threshold: jax.Array,
        until: jax.Array,
    ) -> DecodeState:
        def unfinished(s: DecodeState) -> jax.Array:
            return (s.made < until) & ~jnp.all(s.done)

        def step(s: DecodeState) -> DecodeState:
            newest = jax.lax.dynamic_index_in_dim(s.tokens, s.made - 1, axis=1)
            positions = s.position[:, None]
            out: LlamaOutput = self.model.apply({"params": frozen}, newest, positions, s.cache)
            only = jnp.zeros_like(s.position)
            hidden, g, side_cache = self._correct(frozen, trainable, out, positions, s.side_cache, only)
            choose_key, key = jax.random.split(s.key)
            token, source, ended = self._choose(frozen, trainable, hidden, g, choose_key, sampling, threshold)
            assert out.cache is not None
            return DecodeState(
                out.cache,
                side_cache,
                s.position + 1,
                s.tokens.at[:, s.made].set(token),
                s.sources.at[:, s.made].set(source),
                s.done | ended,
                s.made + 1,
                key,
            )

        return jax.lax.while_loop(unfinished, step, state)


def _check_setting(setting: Setting, plugin: PluginConfig) -> None:
    def runs(wanted: Setting) -> bool:
        same_g = (wanted in ADDED) == (plugin.setting in ADDED)
        return wanted == "base" or (same_g and (plugin.routed or wanted not in ROUTED))

    if not runs(setting):
        possible = ", ".join(s for s in SETTINGS if runs(s))
        raise UserError(f"a plugin trained as '{plugin.setting}' cannot run as '{setting}', only as {possible}")
