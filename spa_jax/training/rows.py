"""Rows of a run and their encoder, as its config asks for them."""

import random

from spa_jax.chat import DATE
from spa_jax.data.encoding import Encoder
from spa_jax.data.hub import read_hub
from spa_jax.data.overlap import warn_of_overlap
from spa_jax.data.pairs import Pair, embedded_persona
from spa_jax.data.row_formats import read_pairs
from spa_jax.data.tasks import find_task, load_split, nested_subset
from spa_jax.errors import UserError
from spa_jax.training.config import DataConfig
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Trained

DEFAULT_LENGTH = 1024
"""Largest number of tokens of a row that belongs to no task."""


def load_pairs(config: DataConfig, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Reads the training and the evaluation rows.

    Raises:
        UserError: an unreadable file or task, too few rows to hold any out, or keys that exclude each other.
    """
    if config.task:
        return _load_task(config)
    if config.directory or config.size != "full" or config.eval_size:
        raise UserError("data.directory, data.size and data.eval_size go with data.task: name a task")
    if config.train or config.hub:
        train, held_out = load_own(config, seed)
        warn_of_overlap(train, held_out)
        return train, held_out
    if config.eval or config.columns:
        key = "eval" if config.eval else "columns"
        raise UserError(
            f"data.{key} is set but data.train is not: the embedded persona brings its own held-out phrasings"
        )
    return embedded_persona(config.persona_seed, config.phrasings)


def load_own(config: DataConfig, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Reads the rows of the user's own files, or of a data set of the hub.

    Raises:
        UserError: both are named, one cannot be read, or there are too few rows to hold any out.
    """
    if config.train and config.hub:
        raise UserError("data.hub takes the place of data.train: leave one of them empty")
    train, held_out = (
        read_hub(config.hub, config.columns) if config.hub else (read_pairs(config.train, config.columns), [])
    )
    if config.eval:
        held_out = read_pairs(config.eval, config.columns)
    if held_out:
        return train, held_out
    count = round(config.eval_fraction * len(train))
    if not 0 < count < len(train):
        raise UserError(
            f"{len(train)} rows in {config.train or config.hub} are too few to hold out "
            f"data.eval_fraction={config.eval_fraction:g}: add rows, or name an evaluation file with data.eval"
        )
    random.Random(seed).shuffle(train)
    return train[count:], train[:count]


def _load_task(config: DataConfig) -> tuple[list[Pair], list[Pair]]:
    if config.train or config.eval or config.hub or config.columns:
        raise UserError("data.task brings its own rows: leave data.train, data.eval, data.hub and data.columns empty")
    train, held_out = (load_split(config.task, config.directory, split) for split in ("train", "validation"))
    if 0 < config.eval_size < sum(len(pair.turns) for pair in held_out):
        held_out = nested_subset(held_out, config.eval_size)
    return nested_subset(train, config.size, config.task), held_out


def make_encoder(backbone: Backbone, config: DataConfig) -> Encoder:
    """Makes the encoder of a run's rows."""
    return task_encoder(backbone, config.template, config.task, config.max_length, config.date)


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
