"""Bytes from the other side may be anything: they are refused by one kind of error, and change nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_split import NEW, make_plugin, make_prompts

from spa_jax.errors import UserError
from spa_jax.split import messages_pb2, wire
from spa_jax.split.head import head_of
from spa_jax.split.messages_pb2 import FromCloud, FromDevice, Open, Reply, Taps
from spa_jax.split.request import device_for, open_message

PROMPTS = make_prompts(8)
KINDS = [
    message for message in vars(messages_pb2).values() if isinstance(message, type) and issubclass(message, Message)
]
SMALL = st.one_of(st.integers(0, 6), st.sampled_from([40, 96, 97, 2**31 - 1, 2**32 - 1]))
FRACTIONS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, -1.0, float("nan"), float("inf")]), st.floats())
TEXTS = st.sampled_from(
    ["", "spa", "s1", "float32", "int8", "correction", "token", "plain", "chat", "true", "targets", "all", "x" * 999]
)


def messages(kind, arrays):
    """Messages of a kind with any of its fields, whose numbers are often those that matter."""

    def field(descriptor):
        if descriptor.type == descriptor.TYPE_MESSAGE:
            one = messages(getattr(messages_pb2, descriptor.message_type.name), arrays)
        else:
            one = {
                descriptor.TYPE_UINT32: SMALL, descriptor.TYPE_INT32: st.integers(-3, 2**31 - 1),
                descriptor.TYPE_DOUBLE: FRACTIONS, descriptor.TYPE_FLOAT: st.floats(width=32),
                descriptor.TYPE_BOOL: st.booleans(), descriptor.TYPE_STRING: TEXTS,
                descriptor.TYPE_BYTES: arrays,
            }[descriptor.type]  # fmt: skip
        return st.lists(one, max_size=5) if descriptor.is_repeated else one

    fields = {descriptor.name: field(descriptor) for descriptor in kind.DESCRIPTOR.fields}
    chosen = st.fixed_dictionaries({}, optional=fields)
    oneofs = [[part.name for part in oneof.fields] for oneof in kind.DESCRIPTOR.oneofs]

    def build(values):
        for names in oneofs:
            for name in [name for name in names if name in values][1:]:
                del values[name]
        return kind(**values)

    return chosen.map(build)


ARRAYS = st.one_of(st.binary(max_size=64), st.integers(0, 9).map(lambda rows: bytes(rows * 3 * 32 * 4)),
                   st.integers(0, 9).map(lambda rows: bytes(rows * 32 * 4)))  # fmt: skip


@settings(max_examples=300)
@given(kind=st.sampled_from(KINDS), data=st.binary(max_size=300))
def test_bytes_are_a_message_or_an_error_of_the_wire(kind, data):
    try:
        kind.FromString(data)
    except DecodeError:
        with pytest.raises(wire.WireError, match=f"no {kind.DESCRIPTOR.name}"):
            wire.parse(kind, data)
    else:
        assert isinstance(wire.parse(kind, data), kind)


@pytest.mark.parametrize("kind", [FromCloud, FromDevice])
@settings(max_examples=100)
@given(data=st.data())
def test_a_message_comes_back_from_its_bytes(kind, data):
    message = data.draw(messages(kind, ARRAYS))
    assert wire.parse(kind, message.SerializeToString()).SerializeToString() == message.SerializeToString()


@pytest.fixture(
    scope="module",
    params=[
        ("tokenwise", "correction", "head", "targets"),
        ("transformer", "correction", "head", "targets"),
        ("tokenwise", "token", "head", "targets"),
        ("transformer", "correction", 2, "all"),
    ],
)
def pair(request, cloud, backbone):
    """A session with a question asked, its device, and the honest reply; with `all`, about the first prompt."""
    kind, reply, entry, edits = request.param
    plugin = make_plugin("s1", kind, 4, entry, edits)
    asked = open_message(plugin, PROMPTS, NEW, reply=reply)
    session = cloud.open(asked)
    device = device_for(plugin, asked, session.lengths, head_of(backbone))
    for part in session.prompt_messages():
        device.receive(part)
    question = session.next_question()
    return session, device, question, device.receive(question)


def test_no_question_upsets_a_device(pair):
    session, device, question, honest = pair

    @settings(max_examples=150)
    @given(message=messages(Taps, ARRAYS), field=st.sampled_from(list(Taps.DESCRIPTOR.fields_by_name)))
    def check(message, field):
        almost = Taps()
        almost.CopyFrom(question)
        almost.ClearField(field)
        almost.MergeFrom(Taps(**{d.name: value for d, value in message.ListFields() if d.name == field}))
        for taps in (message, almost):
            try:
                reply = device.receive(taps)
            except wire.WireError:
                continue
            assert reply is None or reply.step == taps.step
        if not session.plan.task.attends:  # that kind keeps what it receives, and a lie may be valid
            assert device.receive(question) == honest

    check()


def test_no_reply_upsets_a_session(pair):
    session, _, question, honest = pair

    @settings(max_examples=150)
    @given(message=messages(Reply, ARRAYS))
    def check(message):
        if message.step == question.step:
            message.step += 1
        with pytest.raises(wire.WireError, match="is due"):
            session.apply_reply(message)
        wrong = Reply(step=question.step, g=message.g, tokens=message.tokens)
        asked = len(question.rows) if question.prompt else len(set(question.rows))
        fits = len(wrong.tokens) == asked if session.plan.reply == "token" else len(wrong.g.values) == asked * 128
        if not fits:
            with pytest.raises(wire.WireError):
                session.apply_reply(wrong)

    check()
    session.apply_reply(honest)
    assert session.next_question().step == question.step + 1


@settings(max_examples=300)
@given(data=st.data())
def test_no_request_upsets_a_cloud(cloud, data):
    message = data.draw(messages(Open, ARRAYS))
    entry, edits = data.draw(st.sampled_from([("head", "targets"), (2, "targets"), (2, "all")]))
    honest = open_message(make_plugin("spa", "tokenwise", 4, entry, edits), PROMPTS, NEW)
    field = data.draw(st.sampled_from(list(Open.DESCRIPTOR.fields_by_name)))
    almost = Open()
    almost.CopyFrom(honest)
    almost.ClearField(field)
    almost.MergeFrom(Open(**{d.name: value for d, value in message.ListFields() if d.name == field}))
    for prompt in almost.prompts:
        prompt.ClearField("text")  # this backbone has no tokenizer
    try:
        plan = cloud.plan(almost)
    except UserError:
        return
    assert plan.bytes > 0


@pytest.mark.slow
def test_a_coverage_guided_fuzz_of_the_decoders_finds_nothing(tiny_backbone_directory, tmp_path):
    pytest.importorskip("atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    here = Path(__file__).parent
    command = [  # a shell between: Linux hands the peak memory of who starts a program on to the program
        "sh", "-c", '"$@"; exit $?', "sh",
        sys.executable, str(here / "fuzz_decoders.py"), str(tiny_backbone_directory), str(corpus), "-seed=1",
        f"-artifact_prefix={tmp_path}/", "-max_total_time=60", "-rss_limit_mb=3000", "-malloc_limit_mb=2000",
        "-timeout=30", "-max_len=8192",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "stat::number_of_executed_units" in done.stderr or "DONE" in done.stderr
    print(done.stderr[-600:])
