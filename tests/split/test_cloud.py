"""The cloud runs on by itself while it can, compiles once, and refuses what makes no sense by name."""

import numpy as np
import pytest
from tiny_split import CONTEXT, FINGERPRINT, NEW, generate_and_record, make_plugin, make_prompts

from spa_jax.decoding.beam import Beams
from spa_jax.decoding.sampling import Sampling
from spa_jax.engine.programs import pick_taps, run_prompts, run_steps
from spa_jax.engine.schedule import Pace
from spa_jax.errors import UserError
from spa_jax.split import wire
from spa_jax.split.generation import generate
from spa_jax.split.messages_pb2 import Open, Reply
from spa_jax.split.request import open_message

PROMPTS = make_prompts(8)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_the_device_is_asked_no_more_often_than_there_are_tokens_that_need_it(threshold, cloud):
    result = generate(cloud, make_plugin("spa"), open_message(make_plugin("spa"), PROMPTS, NEW, threshold=threshold))
    asked = [flag for generation in result.generations for flag in generation.consulted]
    assert any(asked) == (threshold < 1)
    assert all(asked) == (threshold == 0)
    assert result.traffic.exchanges <= sum(asked)


def test_the_base_setting_sends_the_device_nothing(cloud):
    plugin = make_plugin("spa", "transformer")
    request = open_message(plugin, PROMPTS, NEW, setting="base", beams=Beams(5))
    _, channel = generate_and_record(cloud, plugin, request)
    assert (channel.sent, channel.exchanged) == ([], [])


def test_programs_compile_once_whoever_asks_for_what(cloud, monkeypatch):
    """Setting, taps, threshold, router, length, sampling and entry are arguments."""
    monkeypatch.setattr(Pace, "part_tokens", lambda *_: 512)
    programs = (run_steps, run_prompts, pick_taps)
    generate(cloud, make_plugin("spa"), open_message(make_plugin("spa"), PROMPTS, NEW))
    for program in programs:
        program.clear_cache()
    generate(cloud, make_plugin("spa"), open_message(make_plugin("spa"), PROMPTS, NEW, threshold=0.0))
    before = [program._cache_size() for program in programs]
    for seed, setting, entry in ((1, "spa", "head"), (2, "s2", 2), (3, "s1", 0)):
        plugin = make_plugin(setting, seed=seed, entry=entry)
        how = {"sampling": Sampling(seed / 2, seed, 0.9), "seed": seed, "threshold": 0.0, "codec": "int8"}
        generate(cloud, plugin, open_message(plugin, PROMPTS, NEW - seed, **how))
    assert [program._cache_size() for program in programs] == before


@pytest.fixture
def request_of():
    """A request as any device may write it, with some fields changed."""
    rng = np.random.default_rng(0)
    kernel, offset = (rng.standard_normal(size).astype("<f4").tobytes() for size in (64, 32))

    def make(**fields):
        usual = {
            "version": wire.VERSION, "backbone": FINGERPRINT, "setting": "spa", "threshold": 0.5, "router": kernel,
            "offset": offset, "taps": [0, 2, 3], "codec": "float32", "prompts": [{"tokens": p} for p in PROMPTS],
            "max_new_tokens": NEW, "sampling": {"top_p": 1.0}, "reply": "correction", "edits": "targets",
        }  # fmt: skip
        return Open(**(usual | fields))

    return make


def test_a_cloud_needs_no_plugin(cloud, request_of):
    """Any numbers that come back as g will do."""
    session = cloud.open(request_of())
    rng = np.random.default_rng(1)
    while (question := session.next_question()) is not None:
        g = rng.standard_normal((len(question.rows), 32)).astype("<f4")
        session.apply_reply(Reply(step=question.step, g={"values": g.tobytes()}))
    assert [len(generation.tokens) == len(generation.consulted) > 0 for generation in session.result()] == [True] * 4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"version": 9}, rf"speaks version 9 of the protocol and the cloud version {wire.VERSION}"),
        ({"version": 3}, rf"speaks version 3 of the protocol and the cloud version {wire.VERSION}"),
        ({"backbone": "0" * 32}, f"fingerprint {'0' * 32}, and the cloud runs 'tiny' with fingerprint {FINGERPRINT}"),
        ({"setting": "s4"}, "unknown setting"),
        ({"setting": ""}, "unknown setting"),
        ({"threshold": 1.5}, "threshold out of range"),
        ({"threshold": float("nan")}, "threshold out of range"),
        ({"prompts": []}, "without a prompt"),
        ({"prompts": [{"tokens": [1]}, {"tokens": []}]}, "a prompt is empty"),
        ({"prompts": [{"tokens": [1, 97]}]}, "tokens that this backbone has not"),
        ({"prompts": [{"tokens": [2**32 - 1]}]}, "tokens that this backbone has not"),
        ({"prompts": [{"tokens": [1] * (CONTEXT - NEW + 1)}]}, f"do not fit the backbone's context of {CONTEXT}"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2**32 - 1}, "do not fit"),
        ({"taps": [0, 2, 4]}, "taps .0, 2, 4., which this backbone has not"),
        ({"taps": [2, 0, 3]}, "taps .2, 0, 3."),
        ({"taps": [0, 0, 3]}, "taps .0, 0, 3."),
        ({"taps": []}, "taps "),
        ({"codec": "int4"}, "codec 'int4' is unknown; choices are float32, bfloat16, float16, int8"),
        ({"router": b""}, "the router has 0 bytes, but one for this backbone has 256"),
        ({"router": b"1" * 255}, "the router has 255 bytes"),
        ({"router": b"\xff" * 256}, "the router has numbers that are not finite"),
        ({"offset": b"1" * 4}, "the offset has 4 bytes, but one for this backbone has 128"),
        ({"offset": b"\xff" * 128}, "the offset has numbers that are not finite"),
        ({"sampling": {"temperature": -1.0, "top_p": 1.0}}, "temperature is -1"),
        ({"sampling": {"temperature": np.inf, "top_p": 1.0}}, "temperature is inf"),
        ({"sampling": {"top_p": 0.0}}, "top_p is 0"),
        ({"sampling": {"top_p": 1.0, "top_k": -3}}, "top_k is -3"),
        ({"reply": "g"}, "reply mode 'g' is unknown; choices are correction, token"),
        ({"reply": "token", "beams": {"width": 2, "early_stopping": "false"}}, "beam search .* 'token' can only"),
        ({"entry": 3}, "enter in front of block 3, which this backbone has not"),
        ({"entry": 2**32 - 1}, "which this backbone has not"),
        ({"entry": 2}, "taps .0, 2, 3., which this backbone has not below the entry"),
        ({"entry": 0, "taps": [0, 1]}, "taps .0, 1., which this backbone has not below the entry"),
        ({"edits": ""}, "edits '' are unknown; choices are targets, all"),
        ({"edits": "some", "entry": 2, "taps": [2]}, "edits 'some' are unknown"),
        ({"edits": "all", "offset": b""}, "edits 'all' need .* in front of a block, .* at the entry head$"),
        ({"edits": "all", "entry": 2, "taps": [2]}, "edits 'all' need .* at the entry 2 with an offset"),
        ({"reply": "token", "entry": 2, "taps": [2]}, "in front of block 2, .* cannot choose tokens"),
        ({"beams": {"width": 0, "early_stopping": "false"}}, "beams is 0"),
        ({"beams": {"width": 2, "length_penalty": np.nan, "early_stopping": "false"}}, "length_penalty is nan"),
        ({"beams": {"width": 2, "length_penalty": -9, "early_stopping": "false"}}, "length_penalty is -9"),
        ({"beams": {"width": 9, "early_stopping": "false"}}, "asks for 9 beams, and a cloud searches with at most 8"),
        ({"beams": {"width": 2, "early_stopping": "soon"}}, "early_stopping is 'soon'; choices are true, false, never"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_request_that_makes_no_sense_is_refused_by_name(wrong, says, cloud, request_of):
    with pytest.raises(UserError, match=says):
        cloud.open(request_of(**wrong))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"codec": "int4"}, "codec 'int4' is unknown"),
        ({"setting": "s3"}, "cannot run as 's3'"),
        ({"threshold": 2.0}, "threshold is 2"),
        ({"seed": 2**40}, "out of range"),
        ({"sampling": Sampling(top_k=2**40)}, "out of range"),
        ({"beams": Beams(-1)}, "out of range"),
        ({"prompts": [[-1]]}, "out of range"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_device_does_not_ask_for_what_makes_no_sense(how, says):
    prompts = how.pop("prompts", PROMPTS)
    with pytest.raises(UserError, match=says):
        open_message(make_plugin("spa"), prompts, NEW, **how)
