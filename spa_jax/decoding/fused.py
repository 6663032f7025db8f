"""Generation with backbone, side network and router in one process: the reference for the split one."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.data.padding import padded_length
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.cache import count_slots, prompt_slot_mask, take_rows
from spa_jax.decoding.fused_programs import (
    DecodeState,
    FusedConfig,
    PromptBatch,
    choose_first_token,
    decode,
    end_groups,
    prefill,
    take_groups,
)
from spa_jax.decoding.hypotheses import Generation, to_generations
from spa_jax.decoding.prompt_store import PromptState, PromptStore
from spa_jax.decoding.prompts import check_lengths, check_tokens, longest_extensions, pad_prompts
from spa_jax.decoding.sampling import GREEDY, Sampling
from spa_jax.decoding.settings import resolve_setting, stop_tokens
from spa_jax.models.combine import Setting
from spa_jax.models.llama import Params
from spa_jax.models.method import Method
from spa_jax.models.plugin import PluginConfig
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Trained

MIN_GROUPS = 4
"""Groups below which a batch is not narrowed."""


class FusedModel:
    """A backbone with an optional plugin, ready to generate."""

    def __init__(
        self,
        backbone: Backbone,
        plugin: Trained[Any] | None,
        setting: Setting | None = None,
        threshold: float | None = None,
        prompts: PromptStore | None = None,
    ) -> None:
        """Checks that the plugin can run so; nothing is compiled yet.

        Args:
            backbone: the frozen model.
            plugin: None for the backbone alone. A LoRA or Adapter counts as consulted for every token.
            setting: what goes on from the entry; by default the plugin's own. `base`, and `s1` of a plugin trained as
                `spa` or `s3` of one trained as `s2`, need nothing the plugin does not have.
            threshold: the device is asked where p(consult) is above it; by default the plugin's own.
            prompts: a store of prompts that have run, shared with other models on this backbone; by default none. It is
                not used with a LoRA or Adapter, which change what the backbone computes for a prompt.

        Raises:
            UserError: the plugin was trained on another backbone, or cannot run in that setting.
        """
        if plugin is not None:
            plugin.check(backbone)
        self.setting, self.threshold = resolve_setting(plugin.config if plugin else None, setting, threshold)
        self.backbone, self.plugin = backbone, plugin
        method: Method | None = plugin.config if plugin is not None and self.setting != "base" else None
        if method is not None and method.side is not None:
            # The threshold is an argument of the programs: plugins that differ in it alone share them.
            method = dataclasses.replace(cast(PluginConfig, method), threshold=0.5)
        self.model = backbone.model(method.taps, entry=method.entry) if method else backbone.model()
        stops = stop_tokens(backbone, plugin.template if plugin else "")
        self._config = FusedConfig(self.model, method, self.setting, stops)
        self._prompt_store = prompts if method is None or method.side is not None else None

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        beams: Beams | None = None,
    ) -> DecodeState:
        """Runs the prompts and chooses the first new token of each.

        A prompt that begins another one, as the earlier questions of a conversation do, is run with it.

        Raises:
            UserError: a prompt is empty, does not fit the backbone's context with `max_new_tokens` new tokens, or holds
                tokens that the backbone has not.
        """
        lengths = check_lengths(prompts, max_new_tokens, self.backbone.config.max_position_embeddings)
        check_tokens(prompts, self.backbone.config.vocab_size)
        extensions = longest_extensions(prompts)
        unextended = np.unique(extensions)
        rows = np.searchsorted(unextended, extensions).astype(np.int32)
        batch = PromptBatch(pad_prompts([prompts[i] for i in unextended]), lengths[unextended], rows, lengths)
        width = beams.width if beams else 1
        slots = count_slots(int(lengths.max()), max_new_tokens, width)
        frozen, trainable = self._params

        def run_prompts() -> PromptState:
            return prefill(self._config, frozen, trainable, batch, slots=slots)

        if self._prompt_store is None:
            prompt = run_prompts()
        else:
            config = self._config
            program = (self.model.dtype, self.model.taps, self.model.entry, config.reads_prompt, config.corrects_prompt)
            key = (self.backbone.identity, *program, batch.tokens.shape, *(part.tobytes() for part in batch))
            prompt = self._prompt_store.get(key, batch.tokens.shape[1], slots, run_prompts)
        extended = len(unextended) < len(prompts)
        cache = prompt.cache
        if extended and not self._config.corrects_prompt:
            cache = take_rows(cache, jnp.asarray(rows))
        hypotheses, (cache, side_cache) = choose_first_token(
            self._config, frozen, trainable, cache, prompt.states, prompt.taps, batch, seed, sampling, self.threshold,
            slots=slots, max_new_tokens=max_new_tokens, beams=beams,
        )  # fmt: skip
        if extended:
            side_cache = take_rows(side_cache, jnp.asarray(rows))
            cache = take_rows(cache, jnp.asarray(rows)) if self._config.corrects_prompt else cache
        position = jnp.asarray(lengths)
        return DecodeState(cache, side_cache, prompt_slot_mask(position, width, slots), position, hypotheses)

    def advance(
        self,
        state: DecodeState,
        sampling: Sampling,
        target_length: int,
        beams: Beams | None = None,
        min_active: int = 0,
    ) -> DecodeState:
        """Generates until each group has `target_length` new tokens or is done, or until no more than `min_active` of
        them are left to go on; the state is donated."""
        arguments = (sampling, self.threshold, target_length, min_active)
        return decode(self._config, *self._params, state, *arguments, beams=beams)

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
        others go on, so that a batch does not wait for its longest answer. That is for many batches, since each number
        of groups is a program of its own.
        """
        padding = [prompts[-1]] * (batch_size - len(prompts))
        state = self.start([*prompts, *padding], max_new_tokens, sampling, seed, beams)
        if padding:
            state = end_groups(state, len(prompts))
        groups, generations = np.arange(len(prompts) + len(padding)), dict[int, Generation]()
        while True:
            min_active = len(groups) // 2 if batch_size and len(groups) >= 2 * MIN_GROUPS else 0
            state = self.advance(state, sampling, max_new_tokens, beams, min_active)
            is_done = jax.device_get(state.hypotheses.is_done)
            found = to_generations(state.hypotheses, self._config.eos_ids)
            generations |= {group: each for group, each, done in zip(groups.tolist(), found, is_done) if done}
            if is_done.all():
                return [generations[group] for group in range(len(prompts))]
            undone_first = np.argsort(is_done, stable=True)
            kept = undone_first[: padded_length(int(np.sum(~is_done)), MIN_GROUPS)]
            state, groups = take_groups(state, kept), groups[kept]

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[tuple[int, bool]]:
        """Yields (token, whether the device was asked) of one prompt as they come, EOS included."""
        state = self.start([prompt], max_new_tokens, sampling, seed)
        for count in range(max_new_tokens):
            h = state.hypotheses
            tokens, consulted, is_done = jax.device_get((h.tokens, h.consulted, h.is_done))
            yield int(tokens[0, 0, count]), bool(consulted[0, 0, count])
            if is_done[0]:
                return
            state = self.advance(state, sampling, count + 2)

    @property
    def _params(self) -> tuple[Params, Params]:
        """The backbone's parameters, and the method's where one runs."""
        return self.backbone.params, self.plugin.params if self.plugin and self._config.method else {}
