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
        table2_epochs: `train.epochs` of Table 2's trainings, by the tasks that they are of.
        table2_config: other config keys that all of Table 2's trainings change.
        table2_peft_config: config keys that those of LoRA and Adapter change besides.
        table2_tuned_on: task, size and epochs on which the learning rates of Table 2 are chosen; None for the medium
            size of each training's own task, at its own epochs.
        ablations: config keys that the trainings of the ablation tables change, by task; empty where there are none.
        caption: how the scale differs from the paper, for every table.
    """

    name: str
    config: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, str]]
    transformer: tuple[str, ...]
    table2_epochs: Mapping[str, int]
    table2_config: Mapping[str, Any]
    table2_peft_config: Mapping[str, Any]
    table2_tuned_on: tuple[str, str, int] | None
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


PAPER = Scale(
    name="paper",
    config=_config("llama-2-7b", "bfloat16", 2_000),
    sizes={task: {size: size for size in SIZES} for task in TASKS},
    transformer=TASKS,
    table2_epochs={"xsum": 15, "coqa": 15},
    table2_config={},
    table2_peft_config={},
    table2_tuned_on=None,
    ablations={},
    caption="LLaMA-2-7B for the paper's LLaMA-7B; full is the whole train split, and the paper counts all splits.",
)
MINI = Scale(
    name="mini",
    config=_config("smollm2-135m-instruct", "float32", 0),
    sizes={
        **{task: {"small": "60", "medium": "250", "full": "full"} for task in ("xsum", "cnn_dailymail", "sciq")},
        "coqa": {"small": "900", "medium": "2000", "full": "full"},
        CLOSED_BOOK: {"small": "500", "medium": "2000", "full": "full"},
    },
    transformer=("sciq",),
    table2_epochs={"xsum": 3, "sciq": 3},
    table2_config={"data.max_length": 256},
    table2_peft_config={"peft.remat": "dots", "train.eval_every": 40},
    table2_tuned_on=("sciq", "small", 12),
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
