"""The run's config as typed, frozen dataclasses with the default of every key; a config file's keys are all read here,
or refused by name."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from spa_jax.chat import DATE, parse_date
from spa_jax.data.encoding import Template
from spa_jax.errors import UserError
from spa_jax.models.combine import ROUTED, Edits
from spa_jax.models.compute import Compute
from spa_jax.models.llama import Remat
from spa_jax.models.peft import PEFT_SETTINGS, TARGETS, PeftSetting
from spa_jax.models.side import SideKind
from spa_jax.training.objective import RouterConfig
from spa_jax.training.optimizer import OptimizerConfig
from spa_jax.training.processes import DistributedConfig
from spa_jax.training.sharding import MeshConfig

LARGEST = 2**31 - 1
"""The largest whole number that a key may have: what programs count with is int32."""


@dataclasses.dataclass(frozen=True)
class SideOptions:
    """`side.*`: the side network, and where its corrections enter.

    Attributes:
        entry: where corrections enter the backbone: `middle`, in front of the middle block, or the block of an index,
            from which on the frozen blocks go on from corrected states; or `head`, in front of the LM head.
        edits: which positions are corrected in front of a block: those that predict an answer's tokens (`targets`), or
            the prompt's too (`all`). At `head` nothing reads the prompt's, and both are `targets`.
        kind: `tokenwise`, or `transformer`, which attends over earlier positions.
        width: E.
        taps: see `spa_jax.models.plugin.select_taps`.
        heads: attention heads of the transformer kind.
        init: whether blocks of the transformer kind start at random or as pruned blocks of the backbone.
    """

    entry: str = "middle"
    edits: Edits = "all"
    kind: SideKind = "tokenwise"
    width: int = 32
    taps: str = "every:6"
    heads: int = 4
    init: Literal["random", "pruned"] = "random"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`data.*`.

    Attributes:
        task: one of `spa_jax.data.tasks`, which takes the place of `train` and `eval`; empty for those.
        directory: directory with the task's splits as JSON lines; empty for the hub.
        size: number of the task's training rows, see `spa_jax.data.tasks.nested_subset`.
        eval_size: most questions of the task's validation split to evaluate on; 0 for all.
        train: a file of rows, see `spa_jax.data.row_formats`; empty for the embedded persona.
        eval: the same for evaluation; empty to hold out `eval_fraction` of the training rows.
        hub: in place of `train`, a data set of the Hugging Face hub, `org/name` or `org/name:config`, whose split
            `validation`, if it has one, takes the place of `eval`.
        columns: our names of columns and the data's, such as `source=question,target=answer`; empty where it has ours.
        eval_fraction: share of the training file held out when `eval` is empty.
        template: `chat`, `plain`, or `auto`: chat where the backbone has a template.
        date: the day that a chat template with a date writes, such as `2024-07-26`.
        max_length: most tokens of prompt and target together, 0 for the task's (1024 without one); longer sources are
            cut, longer targets refused.
        phrasings: training phrasings of each fact of the embedded persona; 0 for all.
        persona_seed: whose life the embedded persona is.
    """

    task: str = ""
    directory: str = ""
    size: str = "full"
    eval_size: int = 0
    train: str = ""
    eval: str = ""
    hub: str = ""
    columns: str = ""
    eval_fraction: float = 0.1
    template: Literal["auto"] | Template = "auto"
    date: str = DATE
    max_length: int = 0
    phrasings: int = 0
    persona_seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`train.*`: epochs, examples per optimizer step, the parts a step is worked through in, and steps between reports,
    and between evaluations with a checkpoint (0: once an epoch)."""

    epochs: int = 15
    batch_size: int = 8
    accumulate: int = 1
    log_every: int = 20
    eval_every: int = 0


@dataclasses.dataclass(frozen=True)
class TapCacheConfig:
    """`tap_cache.*`: whether to run the backbone once per example only, where to keep the result (empty: the user's
    cache directory), its largest size, and the dtype of keys and values in it (empty: that of the run)."""

    enabled: bool = True
    directory: str = ""
    limit_gib: float = 20.0
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""


@dataclasses.dataclass(frozen=True)
class RouterOptions(RouterConfig):
    """`router.*`: how the router learns, and when it asks.

    Attributes:
        threshold: the device is asked where p(consult) is above it.
        budget: instead, the largest share of held-out tokens to ask for, from which the threshold follows; 0 for none.
    """

    threshold: float = 0.5
    budget: float = 0.0


@dataclasses.dataclass(frozen=True)
class PeftOptions:
    """`peft.*`, for the settings `lora` and `adapter`.

    Attributes:
        rank: rank of a LoRA.
        alpha: scale of a LoRA; what it adds is multiplied by alpha / rank.
        targets: linear maps that a LoRA adds to, separated by commas, such as `q,v`; there are q, k, v, o, gate, up and
            down.
        width: width of an Adapter's bottlenecks.
        remat: what a block keeps of its forward pass for the backward one: `full` recomputes all of it, `dots` keeps
            products with weights, `none` keeps everything.
    """

    rank: int = 24
    alpha: float = 48.0
    targets: str = "q,v"
    width: int = 48
    remat: Remat = "full"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run; `dtype` is that of the backbone's weights and, except on a CPU, of activations; trainable
    parameters are float32."""

    backbone: str = "smollm2-135m-instruct"
    dtype: Literal["float32", "bfloat16"] = "float32"
    setting: Literal["spa", "s1", "s2", "s3"] | PeftSetting = "spa"
    seed: int = 0
    side: SideOptions = dataclasses.field(default_factory=SideOptions)
    router: RouterOptions = dataclasses.field(default_factory=RouterOptions)
    peft: PeftOptions = dataclasses.field(default_factory=PeftOptions)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    tap_cache: TapCacheConfig = dataclasses.field(default_factory=TapCacheConfig)
    compute: Compute = dataclasses.field(default_factory=Compute)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        bounds = {
            "seed": 0 <= self.seed < 2**31,
            "side.width": self.side.width > 0,
            "side.heads": self.side.heads > 0,
            "peft.rank": self.peft.rank > 0,
            "peft.alpha": 0 < self.peft.alpha < math.inf,
            "peft.width": self.peft.width > 0,
            "router.budget": 0 <= self.router.budget <= 1,
            "router.margin": math.isfinite(self.router.margin),
            "router.threshold": 0 <= self.router.threshold <= 1,
            "data.eval_fraction": 0 < self.data.eval_fraction < 1,
            "data.max_length": self.data.max_length == 0 or self.data.max_length > 1,
            "data.eval_size": self.data.eval_size >= 0,
            "data.phrasings": self.data.phrasings >= 0,
            "train.epochs": self.train.epochs > 0,
            "train.batch_size": self.train.batch_size > 0,
            "train.accumulate": self.train.accumulate > 0 and self.train.batch_size % self.train.accumulate == 0,
            "train.log_every": self.train.log_every > 0,
            "train.eval_every": self.train.eval_every >= 0,
            "optimizer.learning_rate": 0 < self.optimizer.learning_rate < math.inf,
            "optimizer.warmup_fraction": 0 <= self.optimizer.warmup_fraction <= 1,
            "optimizer.final_fraction": 0 <= self.optimizer.final_fraction <= 1,
            "optimizer.weight_decay": 0 <= self.optimizer.weight_decay < math.inf,
            "optimizer.clip_norm": self.optimizer.clip_norm >= 0,
            "optimizer.beta1": 0 <= self.optimizer.beta1 < 1,
            "optimizer.beta2": 0 <= self.optimizer.beta2 < 1,
            "tap_cache.limit_gib": self.tap_cache.limit_gib > 0,
            "distributed.heartbeat_seconds": self.distributed.heartbeat_seconds > 0,
            **{f"mesh.{name}": size == -1 or size > 0 for name, size in dataclasses.asdict(self.mesh).items()},
        }
        wrong = [name for name, holds in bounds.items() if not holds]
        if wrong:
            raise UserError(
                f"config values out of range: {', '.join(wrong)} (sizes and rates are positive, fractions and "
                "thresholds lie between 0 and 1, train.accumulate divides train.batch_size, and -1 leaves a size of "
                "the mesh open)"
            )
        parse_date(self.data.date)
        options = self.router
        if self.setting not in ROUTED and (
            options.objective != "improvement" or options.cross_fit or options.offset or options.budget
        ):
            raise UserError(
                f"setting '{self.setting}' has no router: leave router.objective, router.cross_fit, router.offset and "
                "router.budget at their defaults"
            )
        if options.objective != "improvement" and (options.cross_fit or options.offset):
            raise UserError(
                f"router.cross_fit and router.offset go with router.objective='improvement', not '{options.objective}'"
            )
        targets = self.peft.targets.split(",")
        if not set(targets) <= set(TARGETS) or len(set(targets)) < len(targets):
            raise UserError(f"peft.targets is '{self.peft.targets}': write some of {','.join(TARGETS)}, each once")
        if self.setting in PEFT_SETTINGS and (self.side.kind != "tokenwise" or self.side.init != "random"):
            raise UserError(
                f"setting '{self.setting}' has no side network: leave side.kind and side.init at their defaults"
            )
        if options.offset and self.side.edits == "all" and self.side.entry != "head":
            raise UserError("router.offset enters where new tokens are predicted: set side.edits to 'targets'")
        if self.side.init == "pruned" and self.side.kind != "transformer":
            raise UserError("side.init=pruned copies backbone blocks, which only side.kind=transformer has")
        if self.side.init == "pruned" and self.compute.weights != "float":
            raise UserError("side.init=pruned copies the backbone's floats: leave compute.weights at 'float'")
        if self.side.kind == "transformer" and self.side.width % (2 * self.side.heads):
            raise UserError(
                f"side.width={self.side.width} does not give each of side.heads={self.side.heads} an even width: "
                f"make it a multiple of {2 * self.side.heads}"
            )


def default_config() -> dict[str, Any]:
    """Returns every config key with its default, as nested dictionaries."""
    return dataclasses.asdict(RunConfig())


def with_defaults(keys: Mapping[str, Any]) -> RunConfig:
    """Returns the config of a run that sets some keys and leaves the others at their defaults.

    Args:
        keys: dotted keys such as `{"train.epochs": 6}`, or nested mappings such as `{"train": {"epochs": 6}}`.

    Raises:
        UserError: an unknown key, or a value that is of the wrong type or out of range.
    """
    config = default_config()
    for name, value in keys.items():
        *path, last = name.split(".")
        group = config
        for part in path:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise UserError(f"unknown config key {name}: '{part}' has no keys of its own")
        merge = isinstance(value, Mapping) and isinstance(group.get(last), dict)
        group[last] = {**group[last], **value} if merge else value
    return parse(config)


def parse(config: Mapping[str, Any]) -> RunConfig:
    """Reads the typed config from a config file's ConfigDict.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, an unknown choice or a value out of range, by
            name.
    """
    return _parse(RunConfig, config, "")


def _parse(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(prefix + name for name in values if name not in known)
    if unknown:
        raise UserError(
            f"unknown config key {', '.join(unknown)}; keys here are {', '.join(prefix + name for name in known)}"
        )
    missing = [prefix + name for name in known if name not in values]
    if missing:
        raise UserError(f"config key {', '.join(missing)} is missing: start from configs/default.py")
    return cls(**{name: _value(hints[name], values[name], prefix + name) for name in known})


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config key {name} must hold keys of its own, not {value!r}")
        return _parse(typing.cast(type, hint), value, name + ".")
    choices = _choices(hint)
    if choices:
        if value not in choices:
            raise UserError(f"config key {name} is {value!r}; choices are {', '.join(map(repr, choices))}")
        return value
    if hint is str and type(value) is int:  # the index of a block, or a number of rows
        return str(value)
    if type(value) is int and abs(value) > LARGEST:
        raise UserError(f"config key {name} is larger than {LARGEST}")
    if hint is float and type(value) is int:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"config key {name} is {value!r}, but must be of type {hint.__name__}")
    return value


def _choices(hint: Any) -> tuple[Any, ...]:
    arguments = typing.get_args(hint)
    return tuple(c for a in arguments for c in (typing.get_args(a) or (a,))) if arguments else ()
