"""Rows of a run and their encoder, as its config asks for them."""

import random

from spa_jax.data.encoding import Encoder
from spa_jax.data.hub import read_hub
from spa_jax.data.overlap import warn_of_overlap
from spa_jax.data.pairs import Pair, embedded_persona
from spa_jax.data.row_formats import read_pairs
from spa_jax.data.tasks import load_split, nested_subset
from spa_jax.decoding.encoders import task_encoder
from spa_jax.errors import UserError
from spa_jax.training.config import DataConfig
from spa_jax.weights.backbone import Backbone


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
