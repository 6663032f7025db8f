"""The sizes at which the paper's tables are made: as the paper did, and as two processor cores can."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from spa_jax.errors import UserError

TASKS = ("xsum", "cnn_dailymail", "coqa", "sciq")
"""The paper's data sets, in the order of its tables."""
CLOSED_BOOK = "sciq_closed_book"
TITLES = {"xsum": "XSum", "cnn_dailymail": "CNN-DM", "coqa": "CoQA", "sciq": "SciQ", CLOSED_BOOK: "SciQ, closed book"}
SIZES = ("small", "medium", "full")
EPOCHS, BATCH_SIZE, LEARNING_RATES, BEAMS = 15, 8, (2e-4, 5e-4, 1e-3), 4
"""Section 4.2 of the paper; how many beams it does not say."""
BUDGET = 0.62
"""The paper's share of tokens for which the device is asked: 31 exchanges for 50 tokens."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of every experiment.

    Attributes:
        name: names its directory of results.
        config: config keys that all trainings change from `configs/default.py`.
        sizes: `data.size` of each task by the names of Table 5.
        transformer: tasks on which the transformer kind of side network is trained too.
        table2: tasks of Table 2.
        short: config keys that all trainings beside LoRA change, by task: those of Table 2, and of the tables that
            compare entries.
        short_peft: config keys that those of LoRA and Adapter change besides.
        peft_eval_every: `train.eval_every` of LoRA and Adapter.
        inner_eval_every: `train.eval_every` of the best plugin beside them.
        short_tuned_on: task, size and epochs on which their learning rates are chosen; None for the medium size of each
            training's own task, at its own epochs.
        replacing: tasks on which S2 and S3 are trained at an inner entry.
        beside_lora: tasks on which LoRA stands beside the entries.
        plugin: config keys of the best plugin, which `experiments.paper.search` has found.
        by_size: `data.size` and `train.epochs` of the best plugin in Tables 5 to 7, by task and the names of Table 5.
        more_rows: tasks whose rows are then those of `experiments.paper.more_rows`.
        by_size_caption: how these tables differ from the paper, in place of `caption`.
        ablations: config keys that the trainings of the ablation tables change, by task; empty where there are none.
        caption: how the scale differs from the paper, for every table.
    """

    name: str
    config: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, str]]
    transformer: tuple[str, ...]
    table2: tuple[str, ...]
    short: Mapping[str, Mapping[str, Any]]
    short_peft: Mapping[str, Any]
    peft_eval_every: int
    inner_eval_every: int
    short_tuned_on: tuple[str, str, int] | None
    replacing: tuple[str, ...]
    beside_lora: tuple[str, ...]
    plugin: Mapping[str, Any]
    by_size: Mapping[str, Mapping[str, tuple[str, int]]]
    more_rows: tuple[str, ...]
    by_size_caption: str
    ablations: Mapping[str, Mapping[str, Any]]
    caption: str


def _config(backbone: str, dtype: str, eval_size: int) -> Mapping[str, Any]:
    return FrozenDict(
        {
            "backbone": backbone,
            "dtype": dtype,
            "side.width": 32,
            "side.entry": "head",
            "side.edits": "targets",
            "data.eval_size": eval_size,
            "train.epochs": EPOCHS,
            "train.batch_size": BATCH_SIZE,
            "train.log_every": 100,
        }
    )


PAPER_CAPTION = "LLaMA-2-7B for the paper's LLaMA-7B; full is the whole train split, and the paper counts all splits."
PAPER = Scale(
    name="paper",
    config=_config("llama-2-7b", "bfloat16", 2_000),
    sizes={task: {size: size for size in SIZES} for task in TASKS},
    transformer=TASKS,
    table2=("xsum", "coqa"),
    short={task: FrozenDict({"train.epochs": EPOCHS}) for task in TASKS},
    short_peft={},
    peft_eval_every=0,
    inner_eval_every=0,
    short_tuned_on=None,
    replacing=TASKS,
    beside_lora=TASKS,
    plugin=FrozenDict({"side.entry": "15", "side.edits": "all"}),
    by_size={task: {size: (size, EPOCHS) for size in SIZES} for task in TASKS},
    more_rows=(),
    by_size_caption=PAPER_CAPTION,
    ablations={},
    caption=PAPER_CAPTION,
)
SHORT_LENGTHS = {"xsum": 256, "cnn_dailymail": 384, "coqa": 640, "sciq": 256}
"""Most tokens of a row, by task, of the mini scale's trainings beside LoRA, and of Tables 5 to 7."""
MINI = Scale(
    name="mini",
    config=_config("smollm2-135m-instruct", "float32", 0),
    sizes={
        **{task: {"small": "60", "medium": "250", "full": "full"} for task in ("xsum", "cnn_dailymail", "sciq")},
        "coqa": {"small": "900", "medium": "2000", "full": "full"},
        CLOSED_BOOK: {"small": "500", "medium": "2000", "full": "full"},
    },
    transformer=("sciq",),
    table2=("xsum", "sciq"),
    short={task: FrozenDict({"data.max_length": length, "train.epochs": 3}) for task, length in SHORT_LENGTHS.items()},
    short_peft={"peft.remat": "dots"},
    peft_eval_every=40,
    inner_eval_every=60,
    short_tuned_on=("sciq", "small", 12),
    replacing=("sciq",),
    beside_lora=("xsum", "coqa", "sciq"),
    plugin=FrozenDict(
        {
            "side.entry": "14",
            "side.edits": "all",
            "side.taps": "every:6",
            "optimizer.learning_rate": 2e-3,
            "router.labels": "always",
            "dtype": "bfloat16",
        }
    ),
    by_size={
        "xsum": {"small": ("132", 22), "medium": ("1322", 2), "full": ("3000", 1)},
        "cnn_dailymail": {"small": ("161", 15), "medium": ("1208", 2), "full": ("2512", 1)},
        "coqa": {"small": ("133", 88), "medium": ("1329", 9), "full": ("full", 3)},
        "sciq": {"small": ("1097", 2), "medium": ("2193", 1), "full": ("3000", 1)},
    },
    more_rows=("xsum", "cnn_dailymail", "sciq"),
    by_size_caption=(
        "SmolLM2-135M-Instruct for LLaMA-7B, on sources cut to 256 tokens (CNN-DM 384, CoQA 640). Training rows are in "
        "the paper's ratios, from all official splits, and at most 3,000 (XSum has 6,638 and SciQ 11,140), which is "
        "what two processor cores can do. The paper trains every size for 15 epochs. Here full is seen once (the 265 "
        "stories of CoQA three times), and a smaller size for as many whole epochs as fit into the rows that full "
        "sees, so that all take nearly as many steps (SciQ's smaller sizes three quarters of them). The tests of XSum "
        "and CNN-DM are wider than in other tables, and white space in XSum's articles is collapsed."
    ),
    ablations={
        "sciq": {"data.max_length": 320, "train.epochs": 8},
        "coqa": {"data.max_length": 512, "train.epochs": 8},
    },
    caption=(
        "SmolLM2-135M-Instruct for LLaMA-7B, and hundreds of training rows for hundreds of thousands, taken from the "
        "official validation and test splits: compare rows with each other and not with the paper's. LoRA, Adapter and "
        "what stands beside them train on sources cut to 256 tokens for three epochs."
    ),
)
SCALES = {scale.name: scale for scale in (PAPER, MINI)}


def find_scale(name: str) -> Scale:
    """Returns the scale of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SCALES:
        raise UserError(f"there is no scale '{name}'; scales are {', '.join(SCALES)}")
    return SCALES[name]
