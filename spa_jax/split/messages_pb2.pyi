from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("values", "scales")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    scales: bytes
    def __init__(self, values: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("version", "backbone", "setting", "threshold", "router", "offset", "taps", "codec", "attends", "prompts", "max_new_tokens", "sampling", "beams", "template", "reply", "entry", "edits", "date", "reads_special", "stop", "scored", "own")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    SETTING_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ATTENDS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    DATE_FIELD_NUMBER: _ClassVar[int]
    READS_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    version: int
    backbone: str
    setting: str
    threshold: float
    router: bytes
    offset: bytes
    taps: _containers.RepeatedScalarFieldContainer[int]
    codec: str
    attends: bool
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    max_new_tokens: int
    sampling: Sampling
    beams: Beams
    template: str
    reply: str
    entry: int
    edits: str
    date: str
    reads_special: bool
    stop: _containers.RepeatedScalarFieldContainer[str]
    scored: bool
    own: bytes
    def __init__(self, version: _Optional[int] = ..., backbone: _Optional[str] = ..., setting: _Optional[str] = ..., threshold: _Optional[float] = ..., router: _Optional[bytes] = ..., offset: _Optional[bytes] = ..., taps: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., attends: bool = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., beams: _Optional[_Union[Beams, _Mapping]] = ..., template: _Optional[str] = ..., reply: _Optional[str] = ..., entry: _Optional[int] = ..., edits: _Optional[str] = ..., date: _Optional[str] = ..., reads_special: bool = ..., stop: _Optional[_Iterable[str]] = ..., scored: bool = ..., own: _Optional[bytes] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("tokens", "text", "messages", "raw")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    text: str
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    raw: bool
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., raw: bool = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "tokens")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "frequency_penalty", "presence_penalty")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    frequency_penalty: float
    presence_penalty: float
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ...) -> None: ...

class Beams(_message.Message):
    __slots__ = ("width", "length_penalty", "early_stopping")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    width: int
    length_penalty: float
    early_stopping: str
    def __init__(self, width: _Optional[int] = ..., length_penalty: _Optional[float] = ..., early_stopping: _Optional[str] = ...) -> None: ...

class Taps(_message.Message):
    __slots__ = ("step", "base", "rows", "positions", "origins", "taps", "prompt", "f")
    STEP_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    F_FIELD_NUMBER: _ClassVar[int]
    step: int
    base: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    origins: _containers.RepeatedScalarFieldContainer[int]
    taps: Tensor
    prompt: bool
    f: Tensor
    def __init__(self, step: _Optional[int] = ..., base: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., origins: _Optional[_Iterable[int]] = ..., taps: _Optional[_Union[Tensor, _Mapping]] = ..., prompt: bool = ..., f: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("step", "layer", "place", "count", "x")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    step: int
    layer: int
    place: int
    count: int
    x: Tensor
    def __init__(self, step: _Optional[int] = ..., layer: _Optional[int] = ..., place: _Optional[int] = ..., count: _Optional[int] = ..., x: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("step", "g", "tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    G_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    g: Tensor
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., g: _Optional[_Union[Tensor, _Mapping]] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class FromCloud(_message.Message):
    __slots__ = ("opened", "taps", "refusal", "queued", "working", "progress")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    taps: Taps
    refusal: Refusal
    queued: Queued
    working: Working
    progress: Progress
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., taps: _Optional[_Union[Taps, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ..., working: _Optional[_Union[Working, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class FromDevice(_message.Message):
    __slots__ = ("open", "reply", "reopen", "cancel")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    REOPEN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    open: Open
    reply: Reply
    reopen: Reopen
    cancel: Cancel
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., reopen: _Optional[_Union[Reopen, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session", "version", "lengths", "backbone")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    session: str
    version: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    backbone: str
    def __init__(self, session: _Optional[str] = ..., version: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., backbone: _Optional[str] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("place",)
    PLACE_FIELD_NUMBER: _ClassVar[int]
    place: int
    def __init__(self, place: _Optional[int] = ...) -> None: ...

class Working(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    def __init__(self, tokens: _Optional[int] = ...) -> None: ...

class Reopen(_message.Message):
    __slots__ = ("session", "step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    step: int
    def __init__(self, session: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Progress(_message.Message):
    __slots__ = ("generated", "done", "degraded", "uncorrected_prompts")
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    UNCORRECTED_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    generated: _containers.RepeatedCompositeFieldContainer[Generated]
    done: bool
    degraded: int
    uncorrected_prompts: int
    def __init__(self, generated: _Optional[_Iterable[_Union[Generated, _Mapping]]] = ..., done: bool = ..., degraded: _Optional[int] = ..., uncorrected_prompts: _Optional[int] = ...) -> None: ...

class Generated(_message.Message):
    __slots__ = ("tokens", "consulted", "score", "pieces", "begin", "logprobs", "p_consult", "waits", "stopped")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONSULTED_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    P_CONSULT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    consulted: _containers.RepeatedScalarFieldContainer[bool]
    score: float
    pieces: _containers.RepeatedScalarFieldContainer[str]
    begin: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    p_consult: _containers.RepeatedScalarFieldContainer[float]
    waits: _containers.RepeatedScalarFieldContainer[float]
    stopped: bool
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., consulted: _Optional[_Iterable[bool]] = ..., score: _Optional[float] = ..., pieces: _Optional[_Iterable[str]] = ..., begin: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ..., p_consult: _Optional[_Iterable[float]] = ..., waits: _Optional[_Iterable[float]] = ..., stopped: bool = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("kind", "reason", "version")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    kind: str
    reason: str
    version: int
    def __init__(self, kind: _Optional[str] = ..., reason: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...
