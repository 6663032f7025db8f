"""Prompts that have run once serve other plugins on the same backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused import NEW, PROMPTS, backbone, make_plugin  # noqa: F401 (a fixture)

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.prompt_store import PromptState, PromptStore


@pytest.mark.parametrize("kind", ["tokenwise", pytest.param("transformer", marks=pytest.mark.slow)])
def test_another_model_goes_on_from_what_the_first_one_left(backbone, kind):  # noqa: F811
    store, batch = PromptStore(1.0), [*PROMPTS, PROMPTS[3][:5]]
    first = FusedModel(backbone, make_plugin("spa", kind=kind), "spa", prompts=store)
    first.generate(batch, NEW)
    assert store.hits == 0
    for setting, trained_as, width in (("s1", "spa", None), ("s2", "s2", Beams(3))):  # a beam search has other slots
        plugin = make_plugin(trained_as, kind=kind)
        expected = FusedModel(backbone, plugin, setting).generate(batch, NEW, beams=width)
        found = FusedModel(backbone, plugin, setting, prompts=store).generate(batch, NEW, beams=width)
        assert [(g.tokens, g.consulted) for g in found] == [(g.tokens, g.consulted) for g in expected]
    assert store.hits == 2


def test_what_decides_a_state_decides_where_it_is_kept(backbone):  # noqa: F811
    """No taps, other taps of other tokens, other beginnings of the same prompts: each runs by itself."""
    store = PromptStore(1.0)
    for plugin in (None, make_plugin("spa"), make_plugin("spa", kind="transformer")):
        FusedModel(backbone, plugin, prompts=store).generate(PROMPTS, 2)
    for beginning in (PROMPTS[3][:5], PROMPTS[1][:5]):  # of another prompt, but as long
        FusedModel(backbone, None, prompts=store).generate([*PROMPTS, beginning], 2)
    assert store.hits == 0


def test_the_least_recently_used_go():
    def state(fill):
        return lambda: PromptState(jnp.zeros((0, 1)), jnp.zeros((0, 0, 1, 1)), {"k": jnp.full((1, 64, 4), fill)})

    store = PromptStore(2.5 * 64 * 4 * 4 / 2**30)  # room for two
    store.get("a", 4, 4, state(1.0)), store.get("b", 4, 4, state(2.0))
    kept = store.get("a", 4, 6, state(9.0))
    np.testing.assert_array_equal(kept.cache["k"][0, 0], [1, 1, 1, 1, 0, 0])
    store.get("c", 4, 4, state(3.0))
    assert store.get("b", 4, 4, state(4.0)).cache["k"][0, 0, 0] == 4  # was gone, and is back
    assert store.get("c", 4, 4, state(9.0)).cache["k"][0, 0, 0] == 3
    assert store.hits == 2
    assert jax.tree.leaves(PromptStore(0.0).get("a", 4, 4, state(1.0)))  # too large to keep, but there
