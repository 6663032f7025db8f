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
    __slots__ = ("version", "backbone", "setting", "threshold", "router", "offset", "taps", "codec", "attends", "prompts", "max_new_tokens", "sampling", "beams")
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
    def __init__(self, version: _Optional[int] = ..., backbone: _Optional[str] = ..., setting: _Optional[str] = ..., threshold: _Optional[float] = ..., router: _Optional[bytes] = ..., offset: _Optional[bytes] = ..., taps: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., attends: bool = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., beams: _Optional[_Union[Beams, _Mapping]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("step", "base", "rows", "positions", "origins", "taps", "prompt")
    STEP_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    step: int
    base: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    origins: _containers.RepeatedScalarFieldContainer[int]
    taps: Tensor
    prompt: bool
    def __init__(self, step: _Optional[int] = ..., base: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., origins: _Optional[_Iterable[int]] = ..., taps: _Optional[_Union[Tensor, _Mapping]] = ..., prompt: bool = ...) -> None: ...

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

class Correction(_message.Message):
    __slots__ = ("step", "g")
    STEP_FIELD_NUMBER: _ClassVar[int]
    G_FIELD_NUMBER: _ClassVar[int]
    step: int
    g: Tensor
    def __init__(self, step: _Optional[int] = ..., g: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...
