"""Generation with backbone, side network and router in one process: the reference for the split one.

Shape letters: G groups (prompts), U of them that begin no other one, K hypotheses of each, R = G K rows, T prompt
tokens, N most new tokens, P taps, D width.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spa_jax.data.pipeline import padded_length
from spa_jax.decoding import beam, sampling
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.cache import count_slots, init_cache, place_newest, reorder, see_prompt
from spa_jax.decoding.hypotheses import (
    Generation,
    Hypotheses,
    init_hypotheses,
    last_tokens,
    parent_rows,
    to_generations,
)
from spa_jax.decoding.prompts import PromptState, PromptStore
from spa_jax.decoding.sampling import GREEDY, Sampling
from spa_jax.errors import UserError
from spa_jax.models.block import (
    PADDING,
    Cache,
    CachePlacement,
    place_by_position,
    positions_from_mask,
)
from spa_jax.models.combine import ADDED, ROUTED, SETTINGS, Setting, combine
from spa_jax.models.llama import Llama, LlamaOutput, Params, normalize_taps
from spa_jax.models.peft import Peft, PeftSetting
from spa_jax.models.plugin import PluginConfig, correction, offset_of, router_logits
from spa_jax.models.router import consult
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import PeftPlugin
from spa_jax.weights.plugin import Plugin

NARROWEST = 4
"""Groups below which a batch is not narrowed."""


class DecodeState(NamedTuple):
    """A generation under way; every leaf has the batch first."""

    cache: Cache
    side_cache: Cache | None
    """Of a side network that attends; what a device would keep."""
    seen: Bool[Array, "R S"]
    """The slots of the tokens that each hypothesis consists of, in both caches."""
    position: Int[Array, " G"]
    """Where the newest token will be run."""
    hypotheses: Hypotheses


class FusedModel:
    """A backbone with an optional plugin, ready to generate."""

    def __init__(
        self,
        backbone: Backbone,
        plugin: Plugin | PeftPlugin | None,
        setting: Setting | None = None,
        threshold: float | None = None,
        prompts: PromptStore | None = None,
    ) -> None:
        """Args:
            backbone: the frozen model.
            plugin: None for the backbone alone. A LoRA or Adapter counts as consulted for every token.
            setting: what enters the LM head; by default the plugin's own. `base`, and `s1` of a plugin trained as `spa`
                or `s3` of one trained as `s2`, need nothing the plugin does not have.
            threshold: the device is asked where p(consult) is above it; by default the plugin's own.
            prompts: what keeps prompts that have run, for other models on this backbone; by default nothing does. A
                LoRA or Adapter changes what the backbone makes of a prompt, and has no use for it.

        Raises:
            UserError: the plugin is of another backbone, or cannot run in that setting.
        """
        self.setting, self.threshold = check_setting(backbone, plugin, setting, threshold)
        self.backbone, self.plugin = backbone, plugin
        used = plugin if self.setting != "base" else None
        self._beside = used.config if isinstance(used, Plugin) else None
        self._within = used.config if isinstance(used, PeftPlugin) else None
        taps = self._beside.side.taps if self._beside else ()
        self.model = backbone.model(taps)
        self._prompts = prompts if self._within is None else None
        self._prefill = jax.jit(self._run_prompt, static_argnames="slots")
        self._begin = jax.jit(self._choose_first, static_argnames=("slots", "room", "beams"))
        self._advance = jax.jit(self._run_tokens, static_argnames=("beams",), donate_argnums=(2,))

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        room: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        beams: Beams | None = None,
    ) -> DecodeState:
        """Runs the prompts and chooses the first new token of each, with room for `room` new tokens.

        A prompt that begins another one, as the earlier questions of a conversation do, is run with it.

        Raises:
            UserError: a prompt is empty or leaves no room in the backbone's context.
        """
        lengths = check_lengths(prompts, room, self.backbone.config.max_position_embeddings)
        owners = prompts_begun(prompts)
        whole = np.unique(owners)
        tokens, rows = pad_prompts([prompts[i] for i in whole]), np.searchsorted(whole, owners).astype(np.int32)
        slots = count_slots(int(lengths.max()), room, beams.width if beams else 1)
        frozen, trainable = self._params

        def prefill() -> PromptState:
            return self._prefill(frozen, trainable, tokens, lengths[whole], rows, lengths, slots=slots)

        if self._prompts is None:
            prompt = prefill()
        else:
            attends = self._beside is not None and self._beside.side.attends
            of = (self.backbone.identity, self.model.dtype, self.model.taps, attends)
            key = (*of, tokens.shape, tokens.tobytes(), lengths.tobytes())
            prompt = self._prompts.get(key, tokens.shape[1], slots, prefill)
        hypotheses, side_cache = self._begin(
            frozen, trainable, prompt.hidden, prompt.taps, lengths[whole], rows, lengths, seed, sampling,
            self.threshold, slots=slots, room=room, beams=beams,
        )  # fmt: skip
        caches = (prompt.cache, side_cache)
        if len(whole) < len(rows):
            caches = reorder(caches, jnp.asarray(rows))
        position = jnp.asarray(lengths)
        seen = see_prompt(position, beams.width if beams else 1, slots)
        return DecodeState(*caches, seen, position, hypotheses)

    def advance(
        self, state: DecodeState, sampling: Sampling, until: int, beams: Beams | None = None, least: int = 0
    ) -> DecodeState:
        """Goes on in one jitted loop until `until` new tokens are there or no more than `least` groups are left that
        are not done; the state is donated."""
        frozen, trainable = self._params
        return self._advance(frozen, trainable, state, sampling, self.threshold, until, least, beams=beams)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        beams: Beams | None = None,
        batch_size: int = 0,
    ) -> list[Generation]:
        """Generates for each prompt of token ids, up to its EOS or `max_new_tokens`, by sampling or by beam search.

        With a batch size, prompts are padded to so many groups, and whenever half of the groups are done only the
        others go on, so that a batch does not wait for its longest answer: for many batches, since each bucket of
        groups is a program of its own.
        """
        padding = [prompts[-1]] * (batch_size - len(prompts))
        state = self.start([*prompts, *padding], max_new_tokens, sampling, seed, beams)
        if padding:
            state = _end(state, len(prompts))
        groups, found = np.arange(len(prompts) + len(padding)), dict[int, Generation]()
        while True:
            least = len(groups) // 2 if batch_size and len(groups) >= 2 * NARROWEST else 0
            state = self.advance(state, sampling, max_new_tokens, beams, least)
            done = jax.device_get(state.hypotheses.done)
            reached = to_generations(state.hypotheses, self.backbone.eos_ids)
            found |= {group: each for group, each, ended in zip(groups.tolist(), reached, done) if ended}
            if done.all():
                return [found[group] for group in range(len(prompts))]
            kept = np.argsort(done, stable=True)[: padded_length(int(np.sum(~done)), NARROWEST)]  # first those not done
            state, groups = _narrow(state, kept), groups[kept]

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[tuple[int, bool]]:
        """Yields (token, whether the device was asked) of one prompt as they come, EOS included."""
        state = self.start([prompt], max_new_tokens, sampling, seed)
        for count in range(max_new_tokens):
            chosen = state.hypotheses
            token, source, done = jax.device_get(
                (chosen.tokens[0, 0, count], chosen.consulted[0, 0, count], chosen.done[0])
            )
            yield int(token), bool(source)
            if done:
                return
            state = self.advance(state, sampling, count + 2)

    @property
    def _params(self) -> tuple[Params, Params]:
        return self.backbone.params, self.plugin.params if self.plugin else {}

    def _run(
        self,
        frozen: Params,
        trainable: Params,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        places: CachePlacement | None = None,
    ) -> LlamaOutput:
        peft = Peft(self._within, trainable) if self._within else None
        return self.model.apply({"params": frozen}, tokens, positions, cache, places, peft)

    def _correct(
        self,
        frozen: Params,
        trainable: Params,
        taps: Float[Array, "P B M D"],
        positions: Int[Array, "B M"],
        side_cache: Cache | None,
        places: CachePlacement | None = None,
    ) -> tuple[Float[Array, "B M D"], Cache | None]:
        """g of these tokens, 0 without a side network, and its cache."""
        if self._beside is None:
            return jnp.zeros((*positions.shape, self.model.config.hidden_size), self.model.dtype), side_cache
        taps = normalize_taps(frozen, self.backbone.config, self.model.taps, taps)
        return correction(self._beside, trainable, taps, positions, side_cache, self.model.dtype, places)

    def _choose(
        self,
        frozen: Params,
        trainable: Params,
        hidden: Float[Array, "B D"],
        g: Float[Array, "B D"],
        hypotheses: Hypotheses,
        active: jax.Array,
        sampling: Sampling,
        beams: Beams | None,
        threshold: jax.Array,
    ) -> tuple[Hypotheses, Int[Array, "G K"]]:
        """One more token for the active groups, of B = G rows after the prompt and of B = R rows later."""
        if self.setting in ROUTED:
            sigma = consult(router_logits(trainable, hidden), threshold)
        else:
            sigma = jnp.full(hidden.shape[:1], self.setting != "base")
        state = hidden
        if self._beside is not None:
            state = combine(cast(Setting, self.setting), hidden, g, sigma, offset_of(trainable))
        return choose_next_token(
            self.model, frozen, state, sigma, hypotheses, active, sampling, beams, self.backbone.eos_ids
        )

    def _run_prompt(
        self,
        frozen: Params,
        trainable: Params,
        tokens: Int[Array, "U T"],
        whole: Int[Array, " U"],
        rows: Int[Array, " G"],
        lengths: Int[Array, " G"],
        *,
        slots: int,
    ) -> PromptState:
        """Of U prompts of which the others are beginnings: `rows` says of which, and `lengths` how much of it."""
        runs, width = tokens.shape
        positions = positions_from_mask(jnp.arange(width, dtype=jnp.int32)[None, :] < whole[:, None])
        cache = init_cache(self.backbone.config, runs, slots, self.model.dtype)
        out = self._run(frozen, trainable, tokens, positions, cache, place_by_position(positions, None))
        attends = self._beside is not None and self._beside.side.attends
        taps = out.taps if attends else out.taps[:, rows, lengths - 1][:, :, None]
        return PromptState(out.hidden[rows, lengths - 1], taps, _present(out.cache))

    def _choose_first(
        self,
        frozen: Params,
        trainable: Params,
        hidden: Float[Array, "G D"],
        taps: Float[Array, "P B M D"],
        whole: Int[Array, " U"],
        rows: Int[Array, " G"],
        lengths: Int[Array, " G"],
        seed: jax.Array,
        sampling: Sampling,
        threshold: jax.Array,
        *,
        slots: int,
        room: int,
        beams: Beams | None,
    ) -> tuple[Hypotheses, Cache | None]:
        """The first new token of each prompt, and the side network's cache of U prompts."""
        side_cache = None
        if self._beside is not None and self._beside.side.attends:
            side_cache = init_cache(self._beside.side.block, len(whole), slots, self.model.dtype)
            positions = positions_from_mask(jnp.arange(taps.shape[2], dtype=jnp.int32)[None, :] < whole[:, None])
            g, side_cache = self._correct(frozen, trainable, taps, positions, side_cache)
            g = g[rows, lengths - 1]
        else:
            g, _ = self._correct(frozen, trainable, taps, lengths[:, None] - 1, None)
            g = g[:, 0]
        groups, count = len(lengths), beams.width if beams else 1
        hypotheses = init_hypotheses(groups, count, room, seed, search=beams is not None)
        active = jnp.ones(groups, bool)
        hypotheses, _ = self._choose(frozen, trainable, hidden, g, hypotheses, active, sampling, beams, threshold)
        return hypotheses, side_cache

    def _run_tokens(
        self,
        frozen: Params,
        trainable: Params,
        state: DecodeState,
        sampling: Sampling,
        threshold: jax.Array,
        until: jax.Array,
        least: jax.Array,
        *,
        beams: Beams | None,
    ) -> DecodeState:
        def active(s: DecodeState) -> jax.Array:
            return (s.hypotheses.made < until) & ~s.hypotheses.done

        def step(s: DecodeState) -> DecodeState:
            run, chosen = active(s), s.hypotheses
            tokens = last_tokens(chosen)
            positions = jnp.broadcast_to(jnp.where(run, s.position, PADDING)[:, None], tokens.shape)
            places, seen = place_newest(s.seen, s.position, chosen.made, run)
            out = self._run(frozen, trainable, tokens, positions, s.cache, places)
            g, side_cache = self._correct(frozen, trainable, out.taps, positions, s.side_cache, places)
            hidden, g = (each.reshape(-1, each.shape[-1]) for each in (out.hidden, g))
            hypotheses, parents = self._choose(frozen, trainable, hidden, g, chosen, run, sampling, beams, threshold)
            seen = reorder(seen, parent_rows(parents))
            return DecodeState(_present(out.cache), side_cache, seen, s.position + run, hypotheses)

        return jax.lax.while_loop(lambda s: jnp.sum(active(s)) > least, step, state)


@functools.partial(jax.jit, donate_argnums=0)
def _end(state: DecodeState, beyond: jax.Array) -> DecodeState:
    """The groups from this one on are done."""
    chosen = state.hypotheses
    done = chosen.done | (jnp.arange(len(chosen.done)) >= beyond)
    return state._replace(hypotheses=chosen._replace(done=done))


@jax.jit
def _narrow(state: DecodeState, kept: Int[Array, " H"]) -> DecodeState:
    """Of the groups only these."""
    groups, slots = len(state.position), state.seen.shape[-1]
    narrowed = reorder(state._replace(seen=state.seen.reshape(groups, -1, slots)), kept)
    return narrowed._replace(seen=narrowed.seen.reshape(-1, slots))


def _present(cache: Cache | None) -> Cache:
    assert cache is not None
    return cache


def choose_next_token(
    model: Llama,
    frozen: Params,
    state: Float[Array, "B D"],
    consulted: Bool[Array, " B"],
    hypotheses: Hypotheses,
    active: Bool[Array, " G"],
    how: Sampling,
    beams: Beams | None,
    eos_ids: Sequence[int],
) -> tuple[Hypotheses, Int[Array, "G K"]]:
    """The LM head on what enters it, then one more token for the active groups by sampling or beam search.

    B is R, or G just after the prompt, when all hypotheses of a group have the same state.

    Returns:
        The hypotheses, and for each the index within its group of the one it continues.
    """
    logits = model.apply({"params": frozen}, state, method="logits")
    shape = hypotheses.scores.shape
    logits = jnp.broadcast_to(logits.reshape(shape[0], -1, logits.shape[-1]), (*shape, logits.shape[-1]))
    consulted = jnp.broadcast_to(consulted.reshape(shape[0], -1), shape)
    if beams is not None:
        return beam.extend(beams, hypotheses, logits, consulted, active, eos_ids)
    return sampling.extend(how, hypotheses, logits, consulted, active, eos_ids)


def pad_prompts(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "G T"]:
    """Prompts padded on the right to a common bucket."""
    tokens = np.zeros((len(prompts), padded_length(max(map(len, prompts)), 32)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens


def prompts_begun(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, " G"]:
    """For each prompt the longest one that it is the beginning of, by index; mostly itself."""
    owners = np.arange(len(prompts), dtype=np.int32)
    longest: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        begun = next((k for k in longest if list(prompts[k][: len(prompts[i])]) == list(prompts[i])), None)
        owners[i] = i if begun is None else begun
        longest += [i] if begun is None else []
    return owners


def check_lengths(prompts: Sequence[Sequence[int]], room: int, limit: int) -> Int[np.ndarray, " G"]:
    """Tokens of each prompt.

    Raises:
        UserError: a prompt is empty, or leaves no room for `room` new tokens within `limit` positions.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    if not lengths.all():
        raise UserError("a prompt is empty: it needs at least one token")
    if room < 1 or longest + room > limit:
        raise UserError(
            f"the prompt of {longest} tokens and {room} new ones do not fit the backbone's context of {limit}: "
            "shorten the prompt or change --max_new_tokens"
        )
    return lengths


def check_setting(
    backbone: Backbone, plugin: Plugin | PeftPlugin | None, setting: Setting | None, threshold: float | None
) -> tuple[Setting | PeftSetting, float]:
    """The setting and threshold to run with; by default the plugin's own.

    Raises:
        UserError: the plugin is of another backbone, or cannot run in that setting.
    """
    if plugin is None:
        if setting not in (None, "base"):
            raise UserError(f"setting '{setting}' needs a plugin: name one with --plugin")
        return "base", 0.5
    plugin.check(backbone)
    if isinstance(plugin, PeftPlugin):
        trained_as = plugin.config.setting
        if setting not in (None, "base"):
            raise UserError(f"a '{trained_as}' cannot run as '{setting}', only as what it is, or as base")
        return setting or trained_as, plugin.config.threshold
    return check_threshold(plugin.config, setting, threshold)


def check_threshold(plugin: PluginConfig, setting: Setting | None, threshold: float | None) -> tuple[Setting, float]:
    """`check_setting` where the backbone is elsewhere.

    Raises:
        UserError: the plugin cannot run in that setting, or the threshold is none.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}, but must lie between 0 (always ask) and 1 (never ask)")
    setting = setting or plugin.setting
    _check_parts(setting, plugin)
    return setting, plugin.threshold if threshold is None else threshold


def _check_parts(setting: Setting, plugin: PluginConfig) -> None:
    def runs(wanted: Setting) -> bool:
        same_g = (wanted in ADDED) == (plugin.setting in ADDED)
        return wanted == "base" or (same_g and (plugin.routed or wanted not in ROUTED))

    if not runs(setting):
        possible = ", ".join(s for s in SETTINGS if runs(s))
        raise UserError(f"a plugin trained as '{plugin.setting}' cannot run as '{setting}', only as {possible}")
