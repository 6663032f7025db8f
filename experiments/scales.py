"""At what size the paper's tables are made: as the paper did, or as two processor cores can."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from spa_jax.errors import UserError

TASKS = ("xsum", "cnn_dailymail", "coqa", "sciq")
"""The paper's data sets, in the order of its tables."""
TITLES = {
    "xsum": "XSum", "cnn_dailymail": "CNN-DM", "coqa": "CoQA", "sciq": "SciQ",
    "sciq_closed_book": "SciQ, closed book",
}  # fmt: skip
SIZES = ("small", "medium", "full")


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the two scales of one experiment differ in.

    Attributes:
        name: of the scale, and of its folder of results.
        backbone: by name.
        dtype: of backbone and activations.
        side_width: E of the side networks, with the default taps.
        sizes: training rows of each task (questions, where a row has several), by the names of Table 5.
        questions: most of each task's test questions to generate for; 0 for all.
        eval_size: most validation questions; 0 for all.
        through_length: most tokens of a row where a baseline trains through the backbone; 0 for the task's.
        through_config: of these baselines, beside the default config.
        through_epochs: of these baselines, for the tasks they are trained on; of the others there is no row.
        transformer: tasks on which the transformer kind of side network is trained too.
        through_rates: task, size and epochs on which their learning rate is chosen; None for the task's own.
        changes: what the scale changes against the paper, for the caption of every table.
    """

    name: str
    backbone: str
    dtype: str
    side_width: int
    sizes: Mapping[str, Mapping[str, str]]
    questions: Mapping[str, int]
    eval_size: int
    through_length: int
    through_config: Mapping[str, Mapping[str, Any]]
    through_epochs: Mapping[str, int]
    transformer: tuple[str, ...]
    through_rates: tuple[str, str, int] | None
    changes: str


EPOCHS, BATCH_SIZE, LEARNING_RATES, BEAMS = 15, 8, (2e-4, 5e-4, 1e-3), 4
"""Section 4.2 of the paper; how many beams it does not say."""
BUDGET = 0.62
"""The paper's ratio."""

PAPER = Scale(
    name="paper",
    backbone="llama-2-7b",
    dtype="bfloat16",
    side_width=32,
    sizes={task: {size: size for size in SIZES} for task in TASKS},
    questions=dict.fromkeys(TASKS, 0),
    eval_size=2_000,
    through_length=0,
    through_config={},
    through_epochs={"xsum": 15, "coqa": 15},
    transformer=TASKS,
    through_rates=None,
    changes="LLaMA-2-7B for the paper's LLaMA-7B; full is the whole train split, and the paper counts all splits.",
)
MINI = Scale(
    name="mini",
    backbone="smollm2-135m-instruct",
    dtype="float32",
    side_width=32,
    sizes={
        **{task: {"small": "60", "medium": "250", "full": "full"} for task in ("xsum", "cnn_dailymail", "sciq")},
        "coqa": {"small": "900", "medium": "2000", "full": "full"},
        "sciq_closed_book": {"small": "500", "medium": "2000", "full": "full"},
    },
    questions=dict.fromkeys((*TASKS, "sciq_closed_book"), 0),
    eval_size=0,
    through_length=256,
    through_config={"peft": {"remat": "dots"}, "train": {"eval_every": 40}},
    through_epochs={"xsum": 3, "sciq": 3},
    transformer=("sciq",),
    through_rates=("sciq", "small", 12),
    changes=(
        "SmolLM2-135M-Instruct for LLaMA-7B, and hundreds of training rows for hundreds of thousands, taken from the "
        "official validation and test splits: compare rows with each other and not with the paper's. LoRA, Adapter and "
        "what stands beside them train on sources cut to 256 tokens for three epochs."
    ),
)
SCALES = {scale.name: scale for scale in (PAPER, MINI)}


def find_scale(name: str) -> Scale:
    """Raises:
    UserError: there is none of that name."""
    if name not in SCALES:
        raise UserError(f"there is no scale '{name}'; scales are {', '.join(SCALES)}")
    return SCALES[name]
