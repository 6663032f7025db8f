"""Text to tokens: the prompt's format, the positions that predict target tokens, and what had to be cut."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from spa_jax.data.tasks import Pair
from spa_jax.errors import UserError

Template = Literal["chat", "plain"]


class Example(NamedTuple):
    """One tokenised row. Its R target tokens, EOS included, are predicted at `predict` (shapes: T tokens, int32)."""

    tokens: Int[np.ndarray, " T"]
    predict: Int[np.ndarray, " R"]
    targets: Int[np.ndarray, " R"]

    @property
    def digest(self) -> str:
        """Identifies the example by content: tokenizer, template and truncation all show in the tokens."""
        parts = (np.array([len(self.tokens), len(self.predict)]), *self)
        return hashlib.sha256(b"".join(np.asarray(part, np.int32).tobytes() for part in parts)).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A backbone's tokenizer with one way to write a prompt.

    Attributes:
        tokenizer: of the backbone.
        template: `chat` is the tokenizer's own template with the source as the user's turn; `plain` is the source and a
            line break.
        max_length: most tokens of prompt and target together.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str
    max_length: int

    def __post_init__(self) -> None:
        if self.template not in get_args(Template):
            raise UserError(f"data.template is '{self.template}'; choices are {', '.join(get_args(Template))}")
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise UserError("this backbone has no chat template: set data.template=plain")
        if self.tokenizer.eos_token_id is None:
            raise UserError("this backbone's tokenizer has no end-of-sequence token, so a target could never end")

    def prompt(self, source: str) -> list[int]:
        """Token ids of the prompt for a source text."""
        if self.template == "plain":
            return list(self.tokenizer(source + "\n")["input_ids"])
        turn = [{"role": "user", "content": source}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def target(self, target: str) -> list[int]:
        """Token ids of a target text, EOS at the end."""
        return [*self.tokenizer(target, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def fit_prompt(self, source: str, room: int) -> tuple[list[int], bool]:
        """The prompt in at most `room` tokens, cutting the end of the source where it must; whether it was cut."""
        prompt = self.prompt(source)
        if len(prompt) <= room:
            return prompt, False
        ids = self.tokenizer(source, add_special_tokens=False)["input_ids"]
        keep = len(ids) - (len(prompt) - room)
        while keep > 0:
            prompt = self.prompt(self.tokenizer.decode(ids[:keep]).rstrip("\N{REPLACEMENT CHARACTER}"))
            if len(prompt) <= room:
                return prompt, True
            keep -= len(prompt) - room
        return prompt, True

    def encode(self, pair: Pair) -> tuple[Example, bool]:
        """The example, and whether its source was cut to fit.

        Raises:
            UserError: the target alone leaves no room for a prompt.
        """
        target = self.target(pair.target)
        room = self.max_length - (len(target) - 1)
        prompt, cut = self.fit_prompt(pair.source, room)
        if len(prompt) > room:
            raise UserError(
                f"{pair.origin}: the target has {len(target)} tokens, which with the prompt's format is more than "
                f"data.max_length={self.max_length}; targets are never cut: shorten it or raise data.max_length"
            )
        tokens = np.array(prompt + target[:-1], np.int32)
        predict = np.arange(len(prompt) - 1, len(tokens), dtype=np.int32)
        return Example(tokens, predict, np.array(target, np.int32)), cut

    def encode_all(self, pairs: Sequence[Pair]) -> tuple[list[Example], int]:
        """All examples in order, and how many sources were cut to fit."""
        encoded = [self.encode(pair) for pair in pairs]
        return [example for example, _ in encoded], sum(cut for _, cut in encoded)


class Pieces:
    """The text of tokens as they come; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """What the token adds; empty for a special one."""
        return self._stream.step(self._tokenizer, token) or ""


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> list[str]:
    """The text of each token, as of `Pieces`."""
    stream = Pieces(tokenizer)
    return [stream.add(token) for token in tokens]
