"""Requests of OpenAI's API, and what they ask of a generation.

Field names and meanings are those of https://platform.openai.com/docs/api-reference; `spa` is ours.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spa_jax.choices import Setting
from spa_jax.conversation import Beginning, Conversation
from spa_jax.data.pairs import Turn
from spa_jax.data.text import check_text
from spa_jax.decoding.sampling import GREEDY, Penalties, Sampling
from spa_jax.errors import UserError
from spa_jax.split.request import AnyPrompt
from spa_jax.terminal import OWN, Mode

MAX_CHOICES = 16
"""Most answers to one request."""
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {}, "none", "auto", {"type": "text"}, ["text"])
"""Values of fields that ask for nothing."""
UNSUPPORTED = (
    "tools", "functions", "tool_choice", "function_call", "response_format", "logit_bias", "top_logprobs", "audio",
    "modalities", "prediction", "web_search_options", "suffix", "echo",
)  # fmt: skip
"""Fields that would change an answer, and must ask for nothing."""


class Fields(BaseModel):
    """Fields that may be left out, for which a null stands as well."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, fields: Any) -> Any:
        return (
            {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )


class Extension(Fields):
    """The fields of `spa`, for what else may be asked."""

    model_config = ConfigDict(extra="forbid")

    setting: Setting | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    network_ms: Annotated[float, Field(ge=0, le=60_000)] = 0.0
    """Milliseconds by which each answer of the device is held back, as a slow network would."""


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool = False


class Part(BaseModel):
    """A part of a message that is text."""

    type: Literal["text", "input_text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def turn(self) -> Turn:
        """The turn, as text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Turn("system" if self.role == "developer" else self.role, content)


class Request(Fields):
    """The fields that both kinds of request have."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    spa: Extension = Extension()

    @property
    def prompts(self) -> list[AnyPrompt]:
        """Prompts to be answered, each once for every choice."""
        raise NotImplementedError

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are wanted."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """The most new tokens, where they are named."""
        return self.max_tokens


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None

    @property
    def prompts(self) -> list[AnyPrompt]:
        return [Conversation([(message.turn, ()) for message in self.messages])] * (self.n or 1)

    @property
    def scored(self) -> bool:
        return bool(self.logprobs)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Request):
    """The body of `/v1/completions`."""

    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str | list[int]], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=0, description="0, for those of the tokens themselves")] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self) -> list[AnyPrompt]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: list[Any] = [self.prompt] if is_one else list(self.prompt)
        return [Beginning(p) if isinstance(p, str) else p for p in prompts for _ in range(self.n or 1)]

    @property
    def scored(self) -> bool:
        return self.logprobs is not None


Kind = TypeVar("Kind", bound=Request)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Values that hold where a request does not say.

    Attributes:
        max_new_tokens: most tokens of an answer.
        sampling: how to sample.
        seed: of sampling.
        mode: setting and threshold of plugins.
    """

    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0
    mode: Mode = OWN


@dataclasses.dataclass(frozen=True)
class Ask:
    """All that a request asks of a generation; see `spa_jax.split.request.open_message`."""

    prompts: list[AnyPrompt]
    max_new_tokens: int
    mode: Mode
    sampling: Sampling
    seed: int
    penalties: Penalties
    stop: list[str]
    scored: bool


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Reads the body of a request.

    Raises:
        UserError: it is not JSON, a field has a value that it cannot have, or one asks for what there is not.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise UserError(f"{where}: {first['msg']}") from error
    extra = request.model_extra or {}
    asked = [name for name in UNSUPPORTED if extra.get(name) not in NOTHING]
    if asked:
        raise UserError(f"{asked[0]} is not supported: leave it out")
    return request


def resolve(request: Request, defaults: Defaults) -> Ask:
    """Says what a request asks for, with the defaults where it does not.

    Raises:
        UserError: a text is none.
    """

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    for text in stop:
        check_text(text, "stop")
    for prompt in request.prompts:
        for turn, _ in prompt.turns if isinstance(prompt, Conversation) else ():
            check_text(turn.content, f"the {turn.role}'s message")
        if isinstance(prompt, Beginning):
            check_text(prompt.text, "the prompt")
    sampling = Sampling(
        given(request.temperature, defaults.sampling.temperature),
        given(request.top_k, defaults.sampling.top_k),
        given(request.top_p, defaults.sampling.top_p),
    )
    return Ask(
        prompts=request.prompts,
        max_new_tokens=given(request.limit, defaults.max_new_tokens),
        mode=Mode(
            given(request.spa.setting, defaults.mode.setting), given(request.spa.threshold, defaults.mode.threshold)
        ),
        sampling=sampling,
        seed=given(request.seed, defaults.seed) % 2**31,
        penalties=Penalties(given(request.frequency_penalty, 0.0), given(request.presence_penalty, 0.0)),
        stop=stop,
        scored=request.scored,
    )


def finite(values: list[float]) -> list[float | None]:
    """Replaces numbers that JSON does not have by None."""
    return [value if math.isfinite(value) else None for value in values]
