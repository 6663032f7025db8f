"""Encoders of prompts, and of the rows of tasks, for a backbone."""

from spa_jax.chat import DATE
from spa_jax.data.encoding import Encoder
from spa_jax.data.tasks import find_task
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Trained

DEFAULT_LENGTH = 1024
"""Largest number of tokens of a row that belongs to no task."""


def task_encoder(
    backbone: Backbone,
    template: str,
    task: str,
    max_length: int = 0,
    date: str = "",
    limited_by: str = "data.max_length",
) -> Encoder:
    """Makes the encoder of a task's rows, or of a file's where the name is empty.

    Args:
        backbone: gives the tokenizer, and bounds the length.
        template: format of prompts; `auto`, or empty, is `chat` where the tokenizer has a template.
        task: name of the task.
        max_length: most tokens of a row; 0 is the task's, or 1024.
        date: the day that a chat template with a date writes; by default `spa_jax.chat.DATE`.
        limited_by: what sets `max_length`, for messages.
    """
    if template in ("", "auto"):
        template = "chat" if backbone.tokenizer.chat_template else "plain"
    length, context = row_length(task, max_length), backbone.config.max_position_embeddings
    room = find_task(task).new_tokens if task else 0
    limited_by = limited_by if length < context else ""
    return Encoder(backbone.tokenizer, template, min(length, context), room, date or DATE, limited_by)


def prompt_encoder(backbone: Backbone, trained: Trained | None) -> Encoder:
    """Makes the encoder of single prompts: written as the training rows were, and as long as the backbone's context.

    Args:
        backbone: gives the tokenizer and the length.
        trained: what answers; None for the backbone alone.
    """
    template, date = (trained.template, trained.date) if trained else ("", "")
    return task_encoder(backbone, template, "", backbone.config.max_position_embeddings, date)


def row_length(task: str, max_length: int) -> int:
    """Returns the most tokens of a row: as given, or where that is 0 the task's."""
    return max_length or (find_task(task).max_length if task else DEFAULT_LENGTH)
