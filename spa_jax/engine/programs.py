"""The engine's jitted programs, for groups of any sessions together. They never hold a side parameter.

A *group* is one prompt with its K hypotheses. Its newest tokens stand at the entry; `run_steps` takes them through the
blocks above, chooses the next tokens, runs these up to the entry, and asks the router, so that weights are read once a
step. All that a session asks for is an argument: backbone and shapes alone are compiled in.

Shape letters: G groups of a call, K hypotheses of each, D width, L blocks, E stop tokens, C slots in view, M positions
of parts of prompts, W taps that are wanted.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.decoding.beam import Ranking, Search, rank
from spa_jax.decoding.hypotheses import IMPOSSIBLE, is_end, token_keys
from spa_jax.decoding.sampling import Penalties, Sampling, penalize, sample
from spa_jax.models.block import PADDING, Cache, CachePlacement, rms_norm
from spa_jax.models.llama import Llama, Params, normalize_state, unit
from spa_jax.models.router import consult_probability

MAX_STEPS = 8
"""Most new tokens of a group in one call."""


class Wishes(NamedTuple):
    """The requests of the groups of a call, as arrays."""

    kernel: Float[Array, "G D 2"]
    """The router's."""
    offset: Float[Array, "G D"]
    """Zero where there is none."""
    threshold: Float[Array, " G"]
    routed: Bool[Array, " G"]
    """Whether the router decides; otherwise `asks` does."""
    asks: Bool[Array, " G"]
    adds: Bool[Array, " G"]
    """Whether g is added to the state or replaces it."""
    eos_ids: Int[Array, "G E"]
    """Negative ones are padding."""
    limit: Int[Array, " G"]
    """Most new tokens."""
    sampling: Sampling
    penalties: Penalties
    scored: Bool[Array, " G"]
    """Whether log-probabilities are wanted."""
    seed: Int[Array, " G"]
    number: Int[Array, " G"]
    """Index of the group within its session, which its random key is made of."""
    search: Search | None
    """None where groups have one hypothesis each, which is sampled."""


class Places(NamedTuple):
    """Where each group is in the cache."""

    start: Int[Array, " G"]
    """Its first slot; `PADDING` for a group that is none."""
    begin: Int[Array, " G"]
    """The first slot in its view."""


class Progress(NamedTuple):
    """How far each group is."""

    length: Int[Array, " G"]
    """Tokens of the prompt."""
    generated: Int[Array, " G"]
    state: Float[Array, "G K D"]
    """The newest tokens' uncorrected states at the entry."""
    asked: Bool[Array, "G K"]
    """Whether the device was asked about them."""
    g: Float[Array, "G K D"]
    """Its answer, in units of the entry."""
    answered: Bool[Array, " G"]
    token: Int[Array, " G"]
    """The next token, where the device chose it itself."""
    given: Bool[Array, " G"]
    """Whether it did."""
    said: Int[Array, "G C"] | None
    """New tokens so far, and -1 behind them; None in a search."""
    scores: Float[Array, "G K"]
    """Of a search; otherwise 0."""
    finished_scores: Float[Array, "G K"]
    seen: Bool[Array, "G K C"] | None
    """The slots in view that each hypothesis attends to; None where that is all up to its own."""


class Steps(NamedTuple):
    """What a call of `run_steps` has done, the same number of steps for all groups."""

    num_steps: Int[Array, ""]
    tokens: Int[Array, "steps G K"]
    logprobs: Float[Array, "steps G"]
    """Of the tokens, in nats, before temperature and penalties; NaN where they are not wanted, the device chose, or in
    a search."""
    probability: Float[Array, "steps G K"]
    """p(consult) of the newest tokens after each step."""
    ranking: Ranking | None
    """Of each step `[steps,...]`, of a search; scores of the last one count."""
    is_done: Bool[Array, " G"]
    state: Float[Array, "G K D"]
    asked: Bool[Array, "G K"]
    """Whether the device is asked about the newest tokens."""


Carry = tuple[Int[Array, ""], Cache, Progress, Int[Array, "G V"] | None, Steps, Float[Array, "h GK D"]]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames="view")
def run_steps(
    model: Llama,
    frozen: Params,
    cache: Cache,
    wishes: Wishes,
    places: Places,
    progress: Progress,
    entry: Int[Array, ""],
    most: Int[Array, ""],
    *,
    view: int,
) -> tuple[Cache, Steps, Float[Array, "h GK D"]]:
    """Adds up to `most` tokens to every group, and stops where one newly waits for its device or ends.

    Args:
        model: the backbone with all taps.
        frozen: its parameters.
        cache: shared by all; donated.
        wishes: what the groups ask for.
        places: where they are.
        progress: how far they are.
        entry: where corrections enter, L for `head`.
        most: at least 1, at most `MAX_STEPS`.
        view: C.

    Returns:
        The cache, what was done, and h_0 ... h_L of the newest tokens.
    """
    p, live = progress, places.start < PADDING
    groups, width = p.asked.shape
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(wishes.seed, wishes.number)
    unscored = jnp.full(groups, jnp.nan)
    penalized = jnp.any(
        live & functools.reduce(jnp.logical_or, (jnp.asarray(leaf) != 0.0 for leaf in wishes.penalties))
    )
    size, offset = functools.partial(unit, model, entry=entry), wishes.offset[:, None, :].astype(p.state.dtype)

    def place(generated: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, CachePlacement]:
        """Places the newest tokens; the last token of a prompt, which all hypotheses share, is there once."""
        position = p.length + generated - 1
        shared = jnp.where(column == 0, (p.length - 1)[:, None], PADDING // 2)
        own = (p.length + (generated - 1) * width)[:, None] + column
        slots = places.start[:, None] + jnp.where(generated[:, None] == 0, shared, own)
        slots = jnp.where(live[:, None], slots, PADDING)
        in_view = places.begin[:, None, None] + jnp.arange(view, dtype=jnp.int32)[None, None, :]
        if seen is None:
            seen = (in_view >= places.start[:, None, None]) & (in_view <= slots[:, :, None])
        else:
            seen |= in_view == slots[:, :, None]
        positions = jnp.broadcast_to(jnp.where(live, position, PADDING)[:, None], slots.shape)
        return positions, CachePlacement(slots, seen[:, None], begins=places.begin)

    def count_said() -> jax.Array:
        """Counts how often each answer has each token, if anybody wants to know."""
        counts, said = jnp.zeros((groups, model.config.vocab_size), jnp.int32), p.said
        assert said is not None
        at = jnp.arange(groups)[:, None], jnp.where(said < 0, model.config.vocab_size, said)
        return jax.lax.cond(penalized, lambda: counts.at[at].add(1, mode="drop"), lambda: counts)

    def choose(
        i: jax.Array, s: Progress, counts: jax.Array | None, hidden: jax.Array
    ) -> tuple[jax.Array, jax.Array, Ranking | None, jax.Array]:
        """Returns the next tokens, their log-probabilities, the ranking of a search, and the groups that end."""
        number = s.generated + 1
        logits = functools.partial(model.apply, {"params": frozen}, method="logits")
        if wishes.search is not None:
            ranking = rank(
                wishes.search, s.scores, s.finished_scores, logits(hidden), number, wishes.limit, wishes.eos_ids
            )
            return ranking.tokens, unscored, ranking, ranking.is_done
        assert counts is not None
        given = p.given & (i == 0)

        def draw() -> tuple[jax.Array, jax.Array]:
            found = logits(hidden[:, 0]).astype(jnp.float32)
            chosen = jax.lax.cond(penalized, lambda: penalize(found, counts, wishes.penalties), lambda: found)
            token = sample(token_keys(keys, s.generated), chosen, wishes.sampling)

            def score() -> jax.Array:
                own = jnp.take_along_axis(found, token[:, None], axis=1)[:, 0]
                return jnp.where(wishes.scored & ~given, own - jax.nn.logsumexp(found, axis=-1), jnp.nan)

            return token, jax.lax.cond(jnp.any(wishes.scored & live), score, lambda: unscored)

        drawn, logprobs = jax.lax.cond(jnp.any(live & ~given), draw, lambda: (p.token, unscored))
        token = jnp.where(given, p.token, drawn)
        return token[:, None], logprobs, None, is_end(token, wishes.eos_ids) | (number == wishes.limit)

    def step(carry: Carry) -> Carry:
        i, cache, s, counts, done, _ = carry
        corrected = jnp.where(wishes.adds[:, None, None], s.state, 0) + size(s.state) * p.g.astype(s.state.dtype)
        takes_g = (s.asked & p.answered[:, None])[:, :, None]
        state = jnp.where(takes_g, corrected, s.state + size(s.state) * offset)
        positions, placed = place(s.generated, s.seen)
        hidden, cache = model.apply({"params": frozen}, state, positions, cache, placed, entry=entry, method="upper")
        tokens, logprobs, ranking, is_done = choose(i, s, counts, hidden)
        s = s._replace(generated=s.generated + 1)
        if counts is not None:
            counts = counts.at[jnp.arange(groups), tokens[:, 0]].add(1)
        if ranking is not None:
            assert s.seen is not None
            seen = jnp.take_along_axis(placed.mask[:, 0], ranking.parents[:, :, None], axis=1)
            s = s._replace(scores=ranking.scores, finished_scores=ranking.finished_scores, seen=seen)
        positions, placed = place(s.generated, s.seen)
        state, taps, cache = model.apply(
            {"params": frozen}, tokens, positions, cache, placed, when=jnp.any(live & ~is_done), entry=entry,
            method="lower",
        )  # fmt: skip
        asked, probability = ask_router(model, frozen, wishes, state, entry)
        asked &= s.scores > IMPOSSIBLE / 2
        asked &= (live & ~is_done)[:, None]
        s = s._replace(state=state, asked=asked, seen=None if s.seen is None else placed.mask[:, 0])

        def keep(kept: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(kept, new, i, 0)

        done = Steps(
            i + 1, keep(done.tokens, tokens), keep(done.logprobs, logprobs), keep(done.probability, probability),
            jax.tree.map(keep, done.ranking, ranking), is_done & live, state, asked,
        )  # fmt: skip
        return i + 1, cache, s, counts, done, taps.reshape(len(taps), -1, taps.shape[-1])

    def goes_on(carry: Carry) -> jax.Array:
        i, _, _, _, done, _ = carry
        return (i == 0) | ((i < most) & ~jnp.any(done.asked) & ~jnp.any(done.is_done))

    none = jnp.zeros((groups, width), jnp.int32)
    ranking = None
    if wishes.search is not None:
        scores = jnp.zeros((groups, width))
        ranking = Ranking(none, none, scores, none, none, none, scores, jnp.zeros(groups, bool))
    each = (none, unscored, jnp.zeros((groups, width)), ranking)
    kept = jax.tree.map(lambda leaf: jnp.zeros((MAX_STEPS, *leaf.shape), leaf.dtype), each)
    first = jnp.int32(0)
    no_tokens, no_logprobs, no_probability, no_ranking = kept
    is_done = jnp.zeros(groups, bool)
    done = Steps(first, no_tokens, no_logprobs, no_probability, no_ranking, is_done, p.state, jnp.zeros_like(p.asked))
    taps = jnp.zeros((len(model.taps), groups * width, p.state.shape[-1]), p.state.dtype)
    counts = None if p.said is None else count_said()
    _, cache, _, _, done, taps = jax.lax.while_loop(goes_on, step, (first, cache, p, counts, done, taps))
    return cache, done, taps


class Parts(NamedTuple):
    """A part of each group's prompt."""

    first: Int[Array, " G"]
    """Position of its first token."""
    length: Int[Array, " G"]
    """Tokens of the whole prompt; what the part has beyond is padding."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames="view")
def run_prompts(
    model: Llama,
    frozen: Params,
    cache: Cache,
    tokens: Int[Array, "G M"],
    parts: Parts,
    wishes: Wishes,
    places: Places,
    entry: Int[Array, ""],
    last: Int[Array, ""],
    *,
    view: int,
) -> tuple[
    Cache, Float[Array, "G M D"], Float[Array, "G D"], Bool[Array, " G"], Float[Array, " G"], Float[Array, "h GM D"]
]:
    """Runs a part of each group's prompt through the blocks before `last`; other arguments as for `run_steps`.

    Returns:
        The cache, the states at the entry, that of each part's last token, whether the device is asked about it and
        p(consult), which count if it is the prompt's last one, and h_0 ... h_last.
    """
    positions, placed = _place_parts(parts, places, tokens.shape[1], view)
    h = model.apply({"params": frozen}, tokens, method="embed_tokens")
    h, taps, cache = model.apply(
        {"params": frozen}, h, positions, cache, placed, last=last, taps=model.taps, method="run_blocks"
    )
    states = model.apply({"params": frozen}, taps[entry], entry, method="at_entry")
    newest = jnp.minimum(parts.length - 1 - parts.first, tokens.shape[1] - 1)
    state = jnp.take_along_axis(states, newest[:, None, None], axis=1)
    asked, probability = ask_router(model, frozen, wishes, state, entry)
    return cache, states, state[:, 0], asked[:, 0], probability[:, 0], taps.reshape(len(taps), -1, taps.shape[-1])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames="view")
def finish_prompts(
    model: Llama,
    frozen: Params,
    cache: Cache,
    states: Float[Array, "G M D"],
    g: Float[Array, "G M D"],
    answered: Bool[Array, " G"],
    parts: Parts,
    wishes: Wishes,
    places: Places,
    entry: Int[Array, ""],
    *,
    view: int,
) -> Cache:
    """Goes on from the entry with a part of each group's prompt, corrected by g at every token if it is `answered`."""
    positions, placed = _place_parts(parts, places, states.shape[1], view)
    corrected = jnp.where(wishes.adds[:, None, None], states, 0) + unit(model, states, entry) * g.astype(states.dtype)
    states = jnp.where(answered[:, None, None], corrected, states)
    _, cache = model.apply({"params": frozen}, states, positions, cache, placed, entry=entry, method="upper")
    return cache


def _place_parts(parts: Parts, places: Places, count: int, view: int) -> tuple[jax.Array, CachePlacement]:
    """Places the tokens of a part of each group's prompt, `[G,M]`."""
    positions = parts.first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    is_token = (positions < parts.length[:, None]) & (places.start < PADDING)[:, None]
    positions = jnp.where(is_token, positions, PADDING)
    slots = jnp.where(is_token, places.start[:, None] + positions, PADDING)
    in_view = places.begin[:, None, None] + jnp.arange(view, dtype=jnp.int32)[None, None, :]
    seen = (in_view >= places.start[:, None, None]) & (in_view <= slots[:, :, None])
    return positions, CachePlacement(slots, seen[:, None], begins=places.begin)


def ask_router(
    model: Llama, frozen: Params, wishes: Wishes, state: Float[Array, "G K D"], entry: Int[Array, ""]
) -> tuple[Bool[Array, "G K"], Float[Array, "G K"]]:
    """Computes sigma and p(consult) from states at the entry."""
    read = normalize_state(frozen, model, state, entry).astype(jnp.float32)
    probability = consult_probability(jnp.einsum("gkd,gdr->gkr", read, wishes.kernel))
    sigma = probability > wishes.threshold[:, None]
    return jnp.where(wishes.routed[:, None], sigma, wishes.asks[:, None]), probability


@functools.partial(jax.jit, static_argnums=0)
def pick_taps(
    model: Llama, frozen: Params, taps: Float[Array, "h M D"], layers: Int[Array, " W"], tokens: Int[Array, " W"]
) -> Float[Array, "W D"]:
    """Normalises some taps of some tokens, each by the norm weight of the block that reads it."""
    scales = jnp.concatenate([frozen["blocks"]["attention_norm"]["scale"], frozen["norm"]["scale"][None]])
    return rms_norm(taps[layers, tokens], scales[layers], model.config.rms_norm_eps)
