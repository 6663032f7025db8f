"""Reply mode `token`: the device chooses with its own LM head what one program would choose, and says nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_split import NEW, explained, generate_and_record, make_plugin, make_prompts

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import Sampling
from spa_jax.errors import UserError
from spa_jax.models.llama import Llama, init_params
from spa_jax.split import wire
from spa_jax.split.generation import generate
from spa_jax.split.head import BLOCK, head_of, load_head, logits, save_head
from spa_jax.split.messages_pb2 import Reply, Taps
from spa_jax.split.request import device_for, open_message
from spa_jax.split.wire import WireError

PROMPTS = make_prompts(5)


@pytest.fixture(scope="module")
def head(backbone):
    return head_of(backbone)


def _request(plugin, **how):
    return open_message(plugin, PROMPTS, NEW, reply="token", **how)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=30, top_p=0.95)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("spa", "tokenwise"),
        pytest.param("spa", "transformer", marks=pytest.mark.slow),
        pytest.param("s1", "tokenwise", marks=pytest.mark.slow),
        ("s2", "tokenwise"),
        ("s3", "transformer"),
    ],
)
def test_the_device_chooses_what_one_program_chooses(setting, kind, sampling, backbone, cloud, head):
    for seed in (1, 2):
        plugin = make_plugin("spa" if setting in ("spa", "s1") else "s2", kind, seed)
        how = {"setting": setting, "sampling": sampling, "seed": seed}
        one = FusedModel(backbone, plugin, setting).generate(PROMPTS, NEW, sampling, seed)
        two = generate(cloud, plugin, _request(plugin, **how), head=head)
        assert two.degraded == 0
        for prompt, a, b in zip(PROMPTS, one, two.generations):
            same = (a.tokens, a.consulted) == (b.tokens, b.consulted)
            assert same or (not sampling.temperature and explained(backbone, plugin, setting, prompt, None, 0.5, a, b))


def test_what_goes_back_are_tokens_and_nothing_else(cloud, head):
    plugin = make_plugin("spa")
    fates = []
    for reply, own in (("token", head), ("correction", None)):
        request = open_message(plugin, PROMPTS, NEW, reply=reply, threshold=0.0)
        result = generate(cloud, plugin, request, head=own)
        fates.append(result.traffic.bytes_up)
    assert fates[0] < fates[1] / 10
    session = cloud.open(_request(plugin, threshold=0.0))
    reply = device_for(plugin, _request(plugin), session.lengths, head).receive(session.next_question())
    assert {field.name for field, _ in reply.ListFields()} == {"step", "tokens"}


@pytest.mark.slow
def test_f_travels_in_full_whatever_the_codec(cloud, head):
    """With a side network that says nothing, every token is that of f alone, which rounding would change."""
    plugin = make_plugin("s1")
    silent = dataclasses.replace(plugin, params={"side": jax.tree.map(jnp.zeros_like, plugin.params["side"])})
    base = generate(cloud, silent, open_message(silent, PROMPTS, NEW, setting="base"))
    asked = generate(cloud, silent, _request(silent, codec="int8"), head=head)
    assert [g.tokens for g in asked.generations] == [g.tokens for g in base.generations]
    assert all(all(g.consulted) for g in asked.generations)


def test_a_device_that_is_silent_is_one_that_is_never_asked(cloud, head):
    plugin = make_plugin("spa")
    never = generate(cloud, plugin, _request(plugin, threshold=1.0), head=head)
    silent, channel = generate_and_record(cloud, plugin, _request(plugin), lambda exchange: "question lost", head=head)
    assert silent.generations == never.generations
    assert silent.degraded == len(channel.lost) > 0


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3, 97], [2**32 - 1] * 4, [1] * 5])
def test_tokens_that_make_no_sense_are_refused_and_the_right_ones_still_taken(tokens, cloud, head):
    plugin = make_plugin("s1")
    session = cloud.open(_request(plugin))
    question = session.next_question()
    with pytest.raises(WireError, match=rf"^{len(tokens)} tokens came where 4 below 97 are due"):
        session.apply_reply(Reply(step=1, tokens=tokens))
    session.apply_reply(device_for(plugin, _request(plugin), session.lengths, head).receive(question))
    assert session.next_question().step == 2


def test_beam_search_with_it_and_a_device_without_a_head_are_refused_by_name(cloud):
    plugin = make_plugin("s1")
    with pytest.raises(UserError, match=r"beam search .* reply mode 'token' can only be greedy or sample"):
        _request(plugin, beams=Beams(2))
    with pytest.raises(UserError, match="needs the LM head on the device: name its file with --head"):
        generate(cloud, plugin, _request(plugin))


def test_a_question_without_f_is_refused(cloud, head):
    plugin = make_plugin("s1")
    session = cloud.open(_request(plugin))
    question = Taps()
    question.CopyFrom(session.next_question())
    question.ClearField("f")
    with pytest.raises(WireError, match="0 bytes"):
        device_for(plugin, _request(plugin), session.lengths, head).receive(question)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_backbones(tied, backbone):
    config = dataclasses.replace(backbone.config, tie_word_embeddings=tied)
    other = dataclasses.replace(backbone, config=config, params=init_params(config, seed=3))
    x = jnp.asarray(np.float32(np.random.default_rng(0).standard_normal((3, config.hidden_size))))
    want = Llama(config).apply({"params": other.params}, x, method="logits")
    np.testing.assert_allclose(logits(head_of(other), x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [7, BLOCK, BLOCK + 1, 2 * BLOCK + 900])
def test_an_int8_head_is_off_by_its_rounding_and_no_block_is_left_out(vocabulary):
    rng = np.random.default_rng(vocabulary)
    kernel, x = rng.standard_normal((vocabulary, 16)).astype(np.float32), rng.standard_normal((2, 16))
    head = wire.encode("int8", jnp.asarray(kernel))
    bound = 0.501 * np.abs(x).sum(axis=1)[:, None] * np.abs(kernel).max(axis=1)[None, :] / 127
    error = np.abs(np.asarray(logits(head, jnp.asarray(x, jnp.float32))) - x @ kernel.T)
    assert (error <= bound + 1e-5).all()
    assert error.max() > 1e-4


@pytest.mark.parametrize("codec", wire.CODECS)
def test_a_head_comes_back_from_its_file_as_it_went(codec, backbone, tmp_path):
    save_head(tmp_path / "head", backbone, codec)
    again = load_head(tmp_path / "head", backbone.fingerprint, backbone.config.hidden_size)
    want = head_of(backbone, codec)
    assert again.values.dtype == want.values.dtype
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_that_is_no_head_of_this_backbone_is_refused(backbone, tmp_path):
    d = backbone.config.hidden_size
    save_head(tmp_path / "head", backbone, "int8")
    with pytest.raises(UserError, match="and the plugin was trained on one with 000"):
        load_head(tmp_path / "head", "0" * 32, d)
    with pytest.raises(UserError, match="holds no LM head for this plugin"):
        load_head(tmp_path / "head", backbone.fingerprint, d + 1)
    (tmp_path / "cut").write_bytes((tmp_path / "head").read_bytes()[:-5])
    safetensors.numpy.save_file({"values": np.zeros((9, d), np.int8)}, tmp_path / "unscaled")
    safetensors.numpy.save_file({"weights": np.zeros((9, d), np.float32)}, tmp_path / "misnamed")
    values = np.full((9, d), np.nan, np.float32)
    safetensors.numpy.save_file({"values": values}, tmp_path / "nan", {"fingerprint": backbone.fingerprint})
    with pytest.raises(UserError, match="values of the LM head are not all finite"):
        load_head(tmp_path / "nan", backbone.fingerprint, d)
    for name, says in (("cut", "cannot read"), ("none", "cannot read"), ("unscaled", "no LM"), ("misnamed", "no LM")):
        with pytest.raises(UserError, match=says):
            load_head(tmp_path / name, backbone.fingerprint, d)
