"""Answers of OpenAI's API, whole or in parts as they come.

The field `spa` says of every token where it came from; clients that do not know it ignore it.
"""

import dataclasses
import time
import uuid
from collections.abc import Iterator
from typing import Any

from spa_jax.endpoint.requests import ChatRequest, Request, finite
from spa_jax.split.channel import Traffic
from spa_jax.split.client import RemoteResult
from spa_jax.split.messages_pb2 import Generated, Progress


@dataclasses.dataclass
class Answers:
    """The answers to one request.

    Attributes:
        request: what was asked.
        limit: most tokens of an answer.
        id: of the response.
        created: in seconds since 1970.
    """

    request: Request
    limit: int
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._is_chat = isinstance(self.request, ChatRequest)
        self._num_shown = [0] * len(self.request.prompts)
        self._begins = [0] * len(self.request.prompts)

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yields the parts that come before all others."""
        if self._is_chat:
            for choice in range(len(self._num_shown)):
                yield self._part([{**self._choice(choice), "delta": {"role": "assistant", "content": ""}}])

    def parts(self, progress: Progress, traffic: Traffic) -> Iterator[dict[str, Any]]:
        """Yields what is new of each answer, with what has passed between cloud and device so far."""
        for choice, generated in enumerate(progress.generated):
            first, last = self._num_shown[choice], len(generated.pieces)
            if first < last:
                text = "".join(generated.pieces[first:last])
                said: dict[str, Any] = {"delta": {"content": text}} if self._is_chat else {"text": text}
                said |= self._described(choice, generated, first, last)
                self._num_shown[choice] = last
                yield self._part([{**self._choice(choice), **said}], spa=describe_traffic(traffic))

    def end(self, progress: Progress, result: RemoteResult) -> Iterator[dict[str, Any]]:
        """Yields why each answer ended, and if it is wanted what was used."""
        for choice, generated in enumerate(progress.generated):
            ended: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
            yield self._part(
                [{**self._choice(choice), **ended, "finish_reason": self._reason(generated)}], spa=describe(result)
            )
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield self._part([], usage=self._usage(result))

    def whole(self, progress: Progress, result: RemoteResult) -> dict[str, Any]:
        """Returns all answers at once."""
        choices = []
        for choice, generated in enumerate(progress.generated):
            text = "".join(generated.pieces)
            said: dict[str, Any] = {"text": text}
            if self._is_chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            said |= self._described(choice, generated, 0, len(generated.pieces))
            choices.append({**self._choice(choice), **said, "finish_reason": self._reason(generated)})
        return self._part(choices, kind="", usage=self._usage(result), spa=describe(result))

    def _part(self, choices: list[dict[str, Any]], kind: str = ".chunk", **more: Any) -> dict[str, Any]:
        name, prefix = (f"chat.completion{kind}", "chatcmpl") if self._is_chat else ("text_completion", "cmpl")
        return {
            "id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.request.model,
            "choices": choices, **more,
        }  # fmt: skip

    def _usage(self, result: RemoteResult) -> dict[str, int]:
        """Counts tokens, those of a prompt once for all of its answers."""
        prompt = sum(result.lengths[:: self.request.n or 1])
        new = sum(len(each.tokens) for each in result.generations)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _choice(self, choice: int) -> dict[str, Any]:
        return {"index": choice, "logprobs": None, "finish_reason": None}

    def _reason(self, generated: Generated) -> str:
        """Says why an answer ended; the token that ends one has no text."""
        is_cut = len(generated.tokens) == self.limit and not generated.stopped and bool(generated.pieces[-1])
        return "length" if is_cut else "stop"

    def _described(self, choice: int, generated: Generated, first: int, last: int) -> dict[str, Any]:
        """Describes some tokens: where each came from, and if it is wanted how likely it was."""
        pieces = generated.pieces[first:last]
        p_consult = list(generated.p_consult[first:last]) or [None] * len(pieces)
        tokens = [
            {"text": text, "source": "device" if asked else "cloud", "p_consult": p, "wait_ms": round(1000 * wait, 2)}
            for text, asked, p, wait in zip(
                pieces, generated.consulted[first:last], p_consult, generated.waits[first:last]
            )
        ]
        described: dict[str, Any] = {"spa": {"tokens": tokens}}
        if self.request.scored:
            logprobs = finite(list(generated.logprobs[first:last]))
            if self._is_chat:
                content = [
                    {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                    for text, value in zip(pieces, logprobs)
                ]
                described["logprobs"] = {"content": content, "refusal": None}
            else:
                offsets = []
                for text in pieces:
                    offsets.append(self._begins[choice])
                    self._begins[choice] += len(text)
                described["logprobs"] = {
                    "tokens": list(pieces), "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets,
                }  # fmt: skip
        return described


def describe_traffic(traffic: Traffic) -> dict[str, Any]:
    """Describes what passed between cloud and device."""
    return {
        "exchanges": traffic.exchanges,
        "bytes_down": traffic.bytes_down,
        "bytes_up": traffic.bytes_up,
        "opening_exchanges": traffic.opening_exchanges,
        "opening_bytes": traffic.prefill_bytes,
        "device_ms": round(1000 * traffic.device_seconds, 2),
    }


def describe(result: RemoteResult) -> dict[str, Any]:
    """Describes what passed between cloud and device, and what came of it."""
    tokens = sum(len(each.tokens) for each in result.generations)
    return {
        **describe_traffic(result.traffic),
        "degraded": result.degraded,
        "uncorrected_prompts": result.uncorrected_prompts,
        "consulted_share": sum(sum(each.consulted) for each in result.generations) / max(tokens, 1),
    }
