"""A coverage-guided fuzz of everything that reads bytes from the other side; run by test_hostile.py.

    python tests/split/fuzz_decoders.py BACKBONE CORPUS -max_total_time=30 -rss_limit_mb=4000 -timeout=20

The first byte of an input says who reads the rest. Anything but a `UserError` is a find.
"""

import sys

import atheris

with atheris.instrument_imports(include=["spa_jax.split"]):
    from spa_jax.split import client, wire
    from spa_jax.split.head import head_of
    from spa_jax.split.messages_pb2 import FromDevice, Open, Reply, Taps
    from spa_jax.split.request import device_for, open_message
    from spa_jax.split.session import Cloud

import dataclasses
from pathlib import Path

from tiny_split import FINGERPRINT, make_plugin, make_prompts

from spa_jax.errors import UserError
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.registry import load_backbone

PROMPTS = make_prompts(19)


class Reading:
    """Everybody who reads, with honest messages as a start."""

    def __init__(self, backbone: Backbone) -> None:
        self.cloud = Cloud(backbone)
        self.plugins = {kind: make_plugin("spa", kind) for kind in ("tokenwise", "transformer")}
        self.plugins["opening"] = make_plugin("spa", "transformer", 4, 2, "all")
        self.requests = {
            ("tokenwise", "token"): open_message(self.plugins["tokenwise"], PROMPTS, 4, reply="token", threshold=0),
            ("tokenwise", "correction"): open_message(self.plugins["tokenwise"], PROMPTS, 4, "int8", threshold=0),
            ("transformer", "correction"): open_message(self.plugins["transformer"], PROMPTS, 4, threshold=0),
            ("opening", "correction"): open_message(self.plugins["opening"], PROMPTS, 4, threshold=0),
        }
        self.pairs = []
        for (kind, _), request in self.requests.items():
            session = self.cloud.open(request)
            device = device_for(self.plugins[kind], request, session.lengths, head_of(backbone))
            for part in session.prompt_messages():
                device.receive(part)
            question = session.next_question()
            asked = [group.asked for group in session._groups]
            self.pairs.append((session, asked, device, question, device.receive(question)))

    def seeds(self) -> list[bytes]:
        """Honest inputs."""
        seeds = [bytes([0]) + request.SerializeToString() for request in self.requests.values()]
        for number, (*_, question, reply) in enumerate(self.pairs):
            seeds.append(bytes([1 + 2 * number]) + question.SerializeToString())
            if not question.prompt:
                seeds.append(bytes([2 + 2 * number]) + reply.SerializeToString())
        opened = client.FromCloud(opened={"session": "s", "version": wire.VERSION, "lengths": map(len, PROMPTS)})
        one = {"tokens": [1], "pieces": ["a"], "consulted": [True]}
        progress = client.FromCloud(progress={"generated": [one] * len(PROMPTS)})
        return [*seeds, *(bytes([9]) + message.SerializeToString() for message in (opened, progress))]

    def read(self, data: bytes) -> None:
        """Reads as the one that the first byte names."""
        who, data = (data[0] % 11 if data else 10), data[1:]
        if who == 0:
            self.cloud.plan(wire.parse(Open, data)).bytes  # noqa: B018
        elif who <= 8:
            session, asked, device, question, _ = self.pairs[(who - 1) // 2]
            if who % 2 or question.prompt:  # a reply about a prompt, once read, changes the session
                device.receive(wire.parse(Taps, data))
            else:
                session.apply_reply(wire.parse(Reply, data))
                for group, columns in zip(session._groups, asked):  # they wait for it again
                    group.settle(columns, 0)
        elif who == 9:
            request = self.requests["tokenwise", "correction"]
            where = client.Connection("")
            device = client.DeviceClient(self.plugins["tokenwise"], request, None, None, None, where)
            device.handle_message(data)
        else:
            wire.parse(FromDevice, data)


def main() -> None:
    backbone, corpus = dataclasses.replace(load_backbone(sys.argv.pop(1)), fingerprint=FINGERPRINT), Path(sys.argv[1])
    reading = Reading(backbone)
    for number, seed in enumerate(reading.seeds()):
        reading.read(seed)
        (corpus / f"seed{number}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        try:
            reading.read(data)
        except UserError:
            return

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
