"""What a session takes of a cloud's memory, computed before it begins.

Shape letters: L blocks, D width, V vocabulary, P taps.
"""

from collections.abc import Sequence

from spa_jax.engine.extents import count_units, power_of_two
from spa_jax.engine.group import Task
from spa_jax.engine.schedule import MAX_PART_TOKENS, PART
from spa_jax.models.block import LlamaConfig
from spa_jax.split import wire
from spa_jax.split.opening import CHUNK_POSITIONS
from spa_jax.split.wire import Codec

COPIES = 4
"""Copies of a message with taps on its way: the arrays, the message, its bytes, and those that gRPC has."""
ENVELOPE = 256
"""More bytes than a reply has beside its arrays."""


def kept_bytes(config: LlamaConfig, task: Task, lengths: Sequence[int], codec: Codec, unit_bytes: int) -> int:
    """Counts what a session keeps between calls: its slots, and taps, states and vectors on the host.

    Args:
        config: of the backbone.
        task: what the session asks for.
        lengths: tokens of each prompt.
        codec: how numbers travel.
        unit_bytes: of the cache.
    """
    width, rows = config.hidden_size, len(lengths) * task.columns
    slots = sum(count_units(task.count_slots(length)) for length in lengths) * unit_bytes
    vectors = rows * 4 * (2 * config.vocab_size + 8 * width)  # logits, and how often each token has been said
    prompts = sum(lengths) * _tap_bytes(config, task, codec) if _reads_prompts(task) else 0
    if task.corrects_prompt:
        prompts += 2 * 4 * width * sum(lengths)
    return slots + vectors + prompts + rows * _unsent_bytes(config, task, codec)


def passing_bytes(config: LlamaConfig, task: Task, lengths: Sequence[int], codec: Codec) -> int:
    """Counts the most that a session takes for a moment: for its part of the largest call that runs its prompts, of
    which there are the states between all blocks and, padded, the taps that are read, and for messages on their way.
    Arguments as for `kept_bytes`."""
    taps, rows = _tap_bytes(config, task, codec), len(lengths) * task.columns
    tokens = min(sum(min(power_of_two(length), PART) for length in lengths), MAX_PART_TOKENS)
    picked, joined, message = len(lengths), 0, rows * _unsent_bytes(config, task, codec)
    if _reads_prompts(task):
        picked, joined = tokens, taps * max(lengths)  # the parts of one prompt, beside the whole
        message = max(message, taps * min(max(lengths), CHUNK_POSITIONS))
    prefill = 4 * config.hidden_size * (tokens * (config.num_layers + 1) + 4 * picked * len(task.taps))
    return prefill + joined + COPIES * message + 2 * reply_bytes(config, task, len(lengths), codec)


def reply_bytes(config: LlamaConfig, task: Task, num_prompts: int, codec: Codec) -> int:
    """Counts the most bytes of a message with a valid reply."""
    rows = max(num_prompts * task.width, CHUNK_POSITIONS)
    longest_token = 5
    return rows * max(wire.bytes_per_position(codec, 1, config.hidden_size), longest_token) + ENVELOPE


def _reads_prompts(task: Task) -> bool:
    return task.asks and (task.attends or task.corrects_prompt)


def _tap_bytes(config: LlamaConfig, task: Task, codec: Codec) -> int:
    """Counts the taps of a token."""
    return wire.bytes_per_position(codec, len(task.taps), config.hidden_size)


def _unsent_bytes(config: LlamaConfig, task: Task, codec: Codec) -> int:
    """Counts the taps of a hypothesis that its device has yet to be told of."""
    return _tap_bytes(config, task, codec) * (task.limit if task.attends else 1)
