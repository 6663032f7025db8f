"""Helpers of the tests of cloud and device: random plugins and prompts, a channel that records, and the judge, which
reruns backbone and side network over the whole text for every token."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.decoding import beam
from spa_jax.decoding.hypotheses import IMPOSSIBLE, Generation, init_hypotheses, to_generations
from spa_jax.models.block import PADDING
from spa_jax.models.combine import ROUTED, with_correction, without_correction
from spa_jax.models.llama import Llama, normalize_state, normalize_taps, unit
from spa_jax.models.plugin import PluginConfig, correction, init_plugin, offset_of, router_logits
from spa_jax.models.router import consult_probability
from spa_jax.models.side import SideConfig
from spa_jax.split.channel import InProcess
from spa_jax.split.generation import generate
from spa_jax.split.messages_pb2 import Taps
from spa_jax.weights.plugin import Plugin

TAPS, CONTEXT, NEW, FINGERPRINT = (0, 2, 3), 64, 10, "f" * 32
EOS = (5, 51, 77, 96)
SIDES = {"tokenwise": SideConfig("tokenwise", 6, TAPS), "transformer": SideConfig("transformer", 8, TAPS, heads=2)}
TIE = 1e-4
"""Scores that are closer than this may be told apart by float noise."""

shapes_of = functools.cache(functools.partial(init_plugin, abstract=True))


def make_plugin(setting, kind="tokenwise", seed=4, entry="head", edits="targets"):
    """A plugin with random parameters, as loud as f, and a router that is of two minds; one of the two kinds comes
    with an offset."""
    side = dataclasses.replace(SIDES[kind], taps=tuple(tap for tap in TAPS if entry == "head" or tap <= entry))
    offset = kind == "tokenwise" and edits == "targets"
    config = PluginConfig(setting, side, 32, 0.5, offset, entry, edits)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.float32(0.4 * rng.standard_normal(leaf.shape))), shapes_of(config)
    )
    return Plugin(config, params, "tiny", FINGERPRINT, "plain")


def random_plugin(backbone, setting, seed=4, kind="tokenwise", entry="head", edits="targets"):
    """A plugin for a backbone with the sizes of these tests, as loud as f, and without an offset."""
    config = dataclasses.replace(make_plugin(setting, kind, seed, entry, edits).config, offset=False)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.float32(0.4 * rng.standard_normal(leaf.shape))), shapes_of(config)
    )
    return Plugin(config, params, backbone.name, backbone.fingerprint, "chat")


def make_prompts(seed):
    """Four prompts of unequal lengths, all of one bucket."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, length).tolist() for length in rng.choice(30, 4, replace=False) + 1]


class RecordingChannel(InProcess):
    """Calls the device as a function and keeps every message, of which some are lost or come twice.

    Attributes:
        sent: messages that want no reply.
        exchanged: questions, with the replies that came back.
        lost: (group, token) pairs whose reply was lost.
    """

    def __init__(self, answer, prompts, width, outcome, times):
        super().__init__(answer)
        self.sent, self.exchanged, self.lost = [], [], set()
        self._prompts, self._width, self._outcome, self._times = prompts, width, outcome, times

    def send(self, message):
        self.sent.append(message)
        for _ in range(self._times):
            super().send(message)

    def exchange(self, message):
        """The outcome of an exchange, counted from 0, is `arrives`, `question lost` or `answer lost`."""
        outcome = self._outcome(len(self.exchanged))
        self.traffic.exchanges += 1
        reply = None if outcome == "question lost" else [self._call(message) for _ in range(self._times)][-1]
        if outcome != "arrives":
            reply = None
        if reply is None and not Taps.FromString(message).prompt:
            self.lost |= {(group, token) for group, _, token in tokens_asked(message, self._prompts, self._width)}
        self.exchanged.append((message, reply))
        return reply


def tokens_asked(message, prompts, width):
    """(group, row, index of the new token) of each answer a message asks for."""
    taps = Taps.FromString(message)
    last = dict(zip(taps.rows, taps.positions))
    return [(row // width, row, position - len(prompts[row // width]) + 1) for row, position in last.items()]


def generate_and_record(cloud, plugin, request, outcome=lambda exchange: "arrives", times=1, head=None):
    """The result of a request over a `RecordingChannel`, and the channel."""
    channels = []

    def connect(answer):
        prompts = [list(prompt.tokens) for prompt in request.prompts]
        channels.append(RecordingChannel(answer, prompts, request.beams.width or 1, outcome, times))
        return channels[0]

    return generate(cloud, plugin, request, connect, head), channels[0]


class Verdict(NamedTuple):
    """A generation as the judge would have made it.

    Attributes:
        generation: of one prompt.
        gaps: for each token, the distance between scores that decided it.
        corrections: for each token, g of each row `[K,D]`.
    """

    generation: Generation
    gaps: list[float]
    corrections: list[np.ndarray]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rerun(model, config, setting, frozen, params, tokens, lengths, first, threshold, answered):
    """Logits, sigma, |p - threshold| and g of the last of each row's tokens, by the whole text without any cache.

    The device answers at positions `[T]` that are `answered`; from `first` on they predict new tokens.
    """
    arange = jnp.arange(tokens.shape[1])[None, :]
    positions = jnp.where(arange < lengths[:, None], arange, PADDING)
    f, taps, _ = model.apply({"params": frozen}, tokens, positions, method="lower")
    size, predicts = unit(model, f), positions >= first
    g, _ = correction(config, params, normalize_taps(frozen, model.config, model.taps, taps), positions)
    if setting in ROUTED:
        p = consult_probability(router_logits(params, normalize_state(frozen, model, f)))
        if config.edits == "all":  # the whole prompt is corrected, or nothing
            p = jnp.where(positions <= first, 1, p)
        sigma, distance = p > threshold, jnp.where(p < 1, jnp.abs(p - threshold), 1)
    else:
        sigma, distance = jnp.full(f.shape[:2], setting != "base"), jnp.ones(f.shape[:2])
    sigma &= answered[None, :] & (predicts | (config.edits == "all"))
    offset = offset_of(params) if setting in ROUTED else None
    uncorrected = f
    if offset is not None:
        uncorrected = without_correction(f, jnp.where(predicts[:, :, None], size * offset[None, None, :], 0))
    state = jnp.where(sigma[:, :, None], with_correction(setting, f, size * g), uncorrected)
    hidden, _ = model.apply({"params": frozen}, state, positions, method="upper")
    each = jnp.arange(tokens.shape[0]), lengths - 1
    return model.apply({"params": frozen}, hidden[each], method="logits"), sigma[each], distance[each], g[each]


_init_hypotheses = jax.jit(init_hypotheses, static_argnums=range(5))
_search_step = jax.jit(beam.search_step, static_argnums=(0, 5))
_log_softmax = jax.jit(jax.nn.log_softmax)


def judge(backbone, plugin, setting, prompt, beams=None, threshold=0.5, lost=(), corrects_prompt=True):
    """A `Verdict` on one prompt; the device does not answer for tokens, by their index, that are in `lost`, and before
    the first one only with `corrects_prompt`."""
    answered = np.ones(48, bool)
    answered[[len(prompt) - 1 + token for token in lost]] = False
    answered[: len(prompt)] &= corrects_prompt or plugin.config.edits == "targets"
    width = beams.width if beams else 1
    hypotheses = _init_hypotheses(1, width, NEW, 0, beams is not None)
    texts, tokens, asked, gaps, corrections = [list(prompt)] * width, [], [], [], []
    for num_generated in range(NEW):
        padded = np.zeros((width, 48), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        lengths = np.full(width, len(prompt) + num_generated)
        model = Llama(backbone.config, plugin.config.taps, entry=plugin.config.entry)
        logits, sigma, distance, g = _rerun(
            model,
            plugin.config,
            setting,
            backbone.params,
            plugin.params,
            padded,
            lengths,
            len(prompt) - 1,
            threshold,
            answered,
        )
        corrections.append(np.asarray(g))
        logits, sigma, distance, scores = map(np.asarray, (logits, sigma, distance, hypotheses.scores))
        exists = scores[0] > IMPOSSIBLE / 2
        gap = float(distance[exists].min())
        if beams is None:
            first, second = np.sort(logits[0])[[-1, -2]]
            gaps.append(min(gap, float(first - second)))
            tokens.append(int(logits[0].argmax()))
            asked.append(bool(sigma[0]))
            texts = [[*prompt, *tokens]]
            if tokens[-1] in EOS:
                break
            continue
        before = scores[0][:, None] + np.asarray(_log_softmax(logits))
        hypotheses, _ = _search_step(beams, hypotheses, logits[None], sigma[None], np.ones(1, bool), EOS)
        gaps.append(min(gap, _closest(before, width, num_generated + 1 == NEW)))
        if np.asarray(hypotheses.is_done)[0]:
            best = np.asarray(hypotheses.finished.scores)[0]
            gaps.append(float(best[0] - best[1]))
            return Verdict(to_generations(hypotheses, EOS)[0], gaps, corrections)
        texts = [[*prompt, *new] for new in np.asarray(hypotheses.tokens)[0, :, : num_generated + 1].tolist()]
    return Verdict(Generation(tokens, asked), gaps, corrections)


def _closest(scores, width, last):
    """Between the last continuation that is taken and the first that is not, of those that go on, and of all where one
    of the two ends."""
    ends = np.full(scores.shape, last)
    ends[:, list(EOS)] = True
    order = np.argsort(-scores, axis=None)
    ranked, ending = scores.ravel()[order], ends.ravel()[order]
    going = ranked[~ending]
    gaps = [going[width - 1] - going[width]] if len(going) else []
    if ending[width - 1] or ending[width]:
        gaps.append(ranked[width - 1] - ranked[width])
    return float(min(gaps, default=np.inf))


def explained(backbone, plugin, setting, prompt, beams, threshold, fused, split):
    """Whether scores were closer than `TIE` where the two generations part."""
    gaps = judge(backbone, plugin, setting, prompt, beams, threshold).gaps
    if beams is None:
        pairs = zip([*zip(fused.tokens, fused.consulted), None], [*zip(split.tokens, split.consulted), None])
        parting = next(at for at, (a, b) in enumerate(pairs) if a != b)
        gaps = gaps[parting : parting + 1]
    return min(gaps) < TIE
