"""Text to tokens: the prompt's format, the positions that predict target tokens, and what had to be cut."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from spa_jax.data.pairs import Pair
from spa_jax.errors import UserError

Template = Literal["chat", "plain"]


class Example(NamedTuple):
    """One tokenised row. Its R target tokens, each answer's EOS included, are predicted at `predict` (shapes: T tokens,
    int32)."""

    tokens: Int[np.ndarray, " T"]
    predict: Int[np.ndarray, " R"]
    targets: Int[np.ndarray, " R"]

    @property
    def digest(self) -> str:
        """Identifies the example by content: tokenizer, template and truncation all show in the tokens."""
        parts = (np.array([len(self.tokens), len(self.predict)]), *self)
        return hashlib.sha256(b"".join(np.asarray(part, np.int32).tobytes() for part in parts)).hexdigest()[:32]

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens before each answer; each prompt begins the next one."""
        begins = np.flatnonzero(np.diff(self.predict, prepend=-2) != 1)
        return [self.tokens[: self.predict[begin] + 1].tolist() for begin in begins]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A backbone's tokenizer with one way to write a prompt.

    Attributes:
        tokenizer: of the backbone.
        template: `chat` is the tokenizer's own template with the source as the user's turn; `plain` is the source and a
            line break.
        max_length: most tokens of prompt and target together.
        reserve: tokens of these that a prompt leaves to the target, so that what is cut from a source does not tell how
            long the target is; a longer target takes what it needs.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str
    max_length: int
    reserve: int = 0

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

    def fit(self, source: str, room: int) -> tuple[str, list[int]]:
        """The source, its end cut where its prompt would have more than `room` tokens, and that prompt."""
        prompt = self.prompt(source)
        if len(prompt) <= room:
            return source, prompt
        ids = self.tokenizer(source, add_special_tokens=False)["input_ids"]
        keep = len(ids) - (len(prompt) - room)
        while keep > 0:
            source = self.tokenizer.decode(ids[:keep]).rstrip("\N{REPLACEMENT CHARACTER}")
            prompt = self.prompt(source)
            if len(prompt) <= room:
                break
            keep -= len(prompt) - room
        return source, prompt

    def follow_up(self, source: str) -> list[int]:
        """What stands between the EOS of an answer and the next one: the tokens of the next question.

        Raises:
            UserError: the chat template writes an answer otherwise than trained for.
        """
        if self.template == "plain":
            return list(self.tokenizer(source + "\n", add_special_tokens=False)["input_ids"])
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        asked = [*said, {"role": "user", "content": source}]
        begun, answered, again = (
            self.tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False)
            for turns, asks in ((said[:1], True), (said, False), (asked, True))
        )
        eos = self.tokenizer.eos_token
        content, found, closing = answered.removeprefix(begun).partition(eos)
        if not (answered.startswith(begun) and again.startswith(answered) and found and content.strip() == "b"):
            raise UserError(
                f"this backbone's chat template does not end an answer with {eos} and go on: set data.template=plain"
            )
        text = closing + again[len(answered) :]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, pair: Pair) -> tuple[Example, bool]:
        """The example, every answer of a conversation a target, and whether the first source was cut to fit.

        Raises:
            UserError: all but the first source leave no room for it.
        """
        answers, between, room = self._parts(pair)
        rest = sum(map(len, answers)) + sum(map(len, between)) - 1
        source, prompt = self.fit(pair.source, room)
        if len(prompt) > self.max_length - rest:
            long = "later turns have" if pair.later else "target has"
            raise UserError(
                f"{pair.origin}: the {long} {rest + 1} tokens, which with the prompt's format is more than "
                f"data.max_length={self.max_length}; only the first source is ever cut: shorten the "
                "rest or raise data.max_length"
            )
        parts, predict, end = [np.array(prompt, np.int32)], [], len(prompt)
        for answer, question in zip(answers, [*between, None]):
            predict.append(np.arange(end - 1, end - 1 + len(answer), dtype=np.int32))
            parts += [answer[:-1]] if question is None else [answer, question]
            end += len(answer) + (0 if question is None else len(question))
        example = Example(np.concatenate(parts), np.concatenate(predict), np.concatenate(answers))
        return example, source != pair.source

    def encode_after(self, shown: Pair, pair: Pair) -> Example:
        """The example of a row with another one before it, as a demonstration none of whose answers is a target.

        Either is cut as it would be alone, so together they have up to twice `max_length` tokens.
        """
        first, second = (
            dataclasses.replace(one, source=self.fit(one.source, self._parts(one)[2])[0]) for one in (shown, pair)
        )
        talk = dataclasses.replace(first, later=(*first.later, dataclasses.replace(second, later=()), *second.later))
        example, _ = dataclasses.replace(self, max_length=2 * self.max_length, reserve=0).encode(talk)
        count = sum(len(self.target(turn.target)) for turn in pair.turns)
        return Example(example.tokens, example.predict[-count:], example.targets[-count:])

    def _parts(self, pair: Pair) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """Tokens of the answers, of the questions between them, and the room they leave to the first prompt."""
        answers = [np.array(self.target(turn.target), np.int32) for turn in pair.turns]
        between = [np.array(self.follow_up(turn.source), np.int32) for turn in pair.later]
        others = sum(map(len, answers[:-1])) + sum(map(len, between))
        return answers, between, self.max_length - others - max(len(answers[-1]) - 1, self.reserve)

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
