"""A loaded backbone, whatever file format it came from."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from spa_jax.errors import UserError
from spa_jax.models.block import LlamaConfig
from spa_jax.models.compute import AUTOMATIC, Compute
from spa_jax.models.llama import Entry, Llama, Params, Remat
from spa_jax.models.partitioner import SINGLE_DEVICE, Partitioner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen LLaMA with its tokenizer.

    Attributes:
        name: the name it was loaded by: a registered or hub name, a directory or a file.
        config: the architecture.
        params: parameters in the layout of `spa_jax.models.llama.init_params`, all of one dtype.
        tokenizer: maps text to ids and back, without torch; its `chat_template` is None for a base model.
        eos_ids: ids that end a generation of the backbone alone, ascending; empty when the checkpoint names none.
        fingerprint: 32 hex digits that identify architecture and weights, whatever dtype they were loaded as.
        partitioner: places the parameters on devices.
        compute: the attention kernel, unrolling, and whether matrices are kept in 8 bits.
    """

    name: str
    config: LlamaConfig
    params: Params
    tokenizer: "PreTrainedTokenizerFast"
    eos_ids: tuple[int, ...]
    fingerprint: str
    partitioner: Partitioner = SINGLE_DEVICE
    compute: Compute = AUTOMATIC

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations, and of the parameters that are not quantised."""
        return self.params["norm"]["scale"].dtype

    @property
    def identity(self) -> str:
        """Identifies what it computes: the fingerprint, and how weights are kept if that changes results."""
        return self.fingerprint + ("" if self.compute.weights == "float" else f"-{self.compute.weights}")

    def model(self, taps: tuple[int, ...] = (), remat: Remat = "none", entry: Entry = "head") -> Llama:
        """Makes the program that these parameters belong to.

        Args:
            taps: the hidden states to return, see `Llama`.
            remat: what a block keeps for the backward pass.
            entry: where corrections enter.
        """
        return Llama(self.config, taps, self.dtype, remat, self.partitioner, self.compute, entry)


def check_vocabulary(
    path: pathlib.Path, config: LlamaConfig, tokenizer: "PreTrainedTokenizerFast", eos_ids: Sequence[int]
) -> None:
    """Refuses tokens that have no row in the embedding, which a program would take for the last one.

    Raises:
        UserError: the tokenizer, or the stop tokens, have ids at or above the size of the vocabulary.
    """
    size, vocabulary = config.vocab_size, tokenizer.get_vocab()
    if (largest := max(vocabulary.values(), default=-1)) >= size:
        beyond = sorted(token for token, index in vocabulary.items() if index >= size)
        raise UserError(
            f"{path}: the tokenizer has {len(vocabulary)} tokens with ids up to {largest}, and the embedding has "
            f"{size} rows (vocab_size), so {', '.join(map(repr, beyond[:4]))}{' ...' if beyond[4:] else ''} cannot be "
            "read: enlarge the model by resize_token_embeddings of transformers, or remove these tokens from the "
            "tokenizer's files"
        )
    if eos_ids and max(eos_ids) >= size:
        raise UserError(
            f"{path}: eos_token_id {max(eos_ids)} is no token of a vocabulary of {size} (vocab_size); correct it"
        )
