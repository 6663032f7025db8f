"""Encodes rows as tokens: the prompt's format, the positions that predict target tokens, and truncation."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from spa_jax import chat
from spa_jax.data.pairs import Pair, Turn, exchanges
from spa_jax.data.special_tokens import special_tokens
from spa_jax.errors import UserError

Template = Literal["chat", "plain"]


class Example(NamedTuple):
    """One tokenised row; all arrays are int32.

    Attributes:
        tokens: prompt and answers, without the token that ends the last answer, T tokens.
        predict: the R positions whose output predicts a target token.
        targets: the R target tokens: the answers that are learnt, each with the token that ends it.
    """

    tokens: Int[np.ndarray, " T"]
    predict: Int[np.ndarray, " R"]
    targets: Int[np.ndarray, " R"]

    @property
    def digest(self) -> str:
        """32 hex digits that identify the example's content, and with it the tokenizer, template and truncation."""
        parts = (np.array([len(self.tokens), len(self.predict)]), *self)
        return hashlib.sha256(b"".join(np.asarray(part, np.int32).tobytes() for part in parts)).hexdigest()[:32]

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens before each answer that is learnt; each prompt is a prefix of the next one."""
        begins = np.flatnonzero(np.diff(self.predict, prepend=-2) != 1)
        return [self.tokens[: self.predict[begin] + 1].tolist() for begin in begins]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Writes rows as tokens of one backbone.

    The name of a special token, such as `<|im_end|>`, is text where it stands in a row or a prompt.

    Attributes:
        tokenizer: the backbone's tokenizer.
        template: `chat` writes the source as the user's turn in the tokenizer's own chat template, after its context;
            `plain` writes the source and a line break, and so the context.
        max_length: most tokens of prompt and target together.
        target_room: tokens that every prompt leaves free for its target, so that how much of a source is cut does not
            tell how long the target is. A longer target takes what it needs.
        date: the day that a chat template with a date writes, such as `2024-07-26`.
        reads_special: whether the names of special tokens in texts are these tokens instead.
        limited_by: name of what the user can raise to allow more tokens; empty where `max_length` is the backbone's
            context.
        end: the token that ends a target.

    Raises:
        UserError: an unknown template, `chat` for a tokenizer that has no chat template or one that fails, or nothing
            to end a target with.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str
    max_length: int
    target_room: int = 0
    date: str = chat.DATE
    limited_by: str = "data.max_length"
    reads_special: bool = False
    end: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.template not in get_args(Template):
            raise UserError(f"data.template is '{self.template}'; choices are {', '.join(get_args(Template))}")
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise UserError("this backbone has no chat template: set data.template=plain")
        end = chat.end_of_answer(self.tokenizer, self.template)
        if end is None:
            raise UserError("this backbone's tokenizer has no end-of-sequence token, so a target could never end")
        object.__setattr__(self, "end", end)

    @property
    def writes_date(self) -> bool:
        """Whether prompts depend on the date."""
        return self.template == "chat" and chat.writes_date(self.tokenizer)

    @property
    def limit(self) -> str:
        """Describes `max_length` in messages."""
        context = f"the backbone's context of {self.max_length} tokens"
        return f"{self.limited_by}={self.max_length}" if self.limited_by else context

    def prompt(self, source: str, context: Sequence[Turn] = ()) -> list[int]:
        """Returns the token ids of the prompt for a source text after some other turns.

        Raises:
            UserError: the chat template does not write one of them, such as a system turn.
        """
        turns = self._written((*context, Turn("user", source)))
        if self.template == "plain":
            return self._tokens(self._plain(turns), begin=True)
        text = self._chat(turns, open_answer=True)
        self._check_written(turns, text)
        return self._tokens(text)

    def raw(self, text: str) -> list[int]:
        """Returns the token ids of a text that is to be continued as it is, in no template."""
        return self._tokens(self._text(text), begin=True)

    def target(self, target: str) -> list[int]:
        """Returns the token ids of a target text, with the token that ends it."""
        return [*self._tokens(self._text(target)), self.end]

    def truncate(self, source: str, max_tokens: int, context: Sequence[Turn] = ()) -> tuple[str, list[int]]:
        """Cuts the end of a source whose prompt, after its context, would have more than `max_tokens` tokens.

        Returns:
            The source, cut or whole, and the token ids of its prompt.
        """
        prompt = self.prompt(source, context)
        if len(prompt) <= max_tokens:
            return source, prompt
        ids = self._tokens(self._text(source))
        keep = len(ids) - (len(prompt) - max_tokens)
        while keep > 0:
            source = self.tokenizer.decode(ids[:keep]).rstrip("\N{REPLACEMENT CHARACTER}")
            prompt = self.prompt(source, context)
            if len(prompt) <= max_tokens:
                break
            keep -= len(prompt) - max_tokens
        return source, prompt

    def follow_up(self, source: str, context: Sequence[Turn] = (), opening: Sequence[Turn] = ()) -> list[int]:
        """Returns the token ids of a later question of a conversation, from the end of the answer before it (its
        token not included) to where its own answer begins.

        Args:
            source: the question.
            context: turns between that answer and the question.
            opening: the context with which the conversation began.

        Raises:
            UserError: the chat template does not write an answer as its text, the token that ends it and then the turns
                that follow.
        """
        turns = self._written((*context, Turn("user", source)))
        if self.template == "plain":
            return self._tokens(self._plain(turns))
        exchange = (*self._written(opening), Turn("user", "a"), Turn("assistant", "b"))
        first_prompt = self._chat(exchange[:-1], open_answer=True)
        answered = self._chat(exchange, open_answer=False)
        second_prompt = self._chat((*exchange, *turns), open_answer=True)
        content, found, closing = answered.removeprefix(first_prompt).partition(self._end_text)
        continues = answered.startswith(first_prompt) and second_prompt.startswith(answered)
        if not (continues and found and content.strip() == "b"):
            raise UserError(
                f"this backbone's chat template does not end an answer with {self._end_text} and go on: set "
                "data.template=plain"
            )
        text = closing + second_prompt[len(answered) :]
        self._check_written(turns, text)
        return self._tokens(text)

    def conversation(self, turns: Iterable[tuple[Turn, Sequence[int]]]) -> list[int]:
        """Returns the token ids of the prompt for the last question of a conversation, written as the training rows
        are. The prompt of a conversation is the beginning of that of any longer one.

        Args:
            turns: the conversation, each with token ids; of an answer, those that were generated, if they are known,
                and nothing of other turns.

        Raises:
            UserError: it does not end in a user's turn, an answer follows none, or the chat template cannot write it.
        """
        answered, asked = exchanges(turns, "this conversation")
        if not asked or asked[-1].role != "user":
            raise UserError("a conversation ends in the user's turn that is to be answered, and this one does not")
        tokens: list[int] = []
        opening = (answered[0][0] if answered else asked)[:-1]
        for (*context, question), answer, generated in [*answered, (asked, None, ())]:
            if tokens:
                tokens += self.follow_up(question.content, context, opening)
            else:
                tokens += self.prompt(question.content, context)
            if answer is not None:
                tokens += generated or self.target(answer.content)
                tokens += [self.end] if tokens[-1] != self.end else []
        return tokens

    def _text(self, content: str) -> str:
        """Makes sure that nothing in a text becomes a special token."""
        return content if self.reads_special else special_tokens(self.tokenizer).hide(content)

    def _written(self, turns: Sequence[Turn]) -> list[Turn]:
        return [Turn(turn.role, self._text(turn.content)) for turn in turns]

    def _tokens(self, text: str, begin: bool = False) -> list[int]:
        return special_tokens(self.tokenizer).encode(text, begin)

    def _chat(self, turns: Sequence[Turn], open_answer: bool) -> str:
        """Writes turns as the chat template does, and the beginning of an answer if that is to follow."""
        return chat.render(self.tokenizer, [turn._asdict() for turn in turns], open_answer, self.date)

    def _check_written(self, turns: Sequence[Turn], text: str) -> None:
        """Refuses a text in which the question, the last of the turns, or one in front of it is not as it was."""
        missing = [index for index, turn in enumerate(turns, start=1) if turn.content.strip() not in text]
        if missing == [len(turns)]:
            raise UserError("this backbone's chat template does not write a question as it is: set data.template=plain")
        if missing:
            raise UserError(
                f"this backbone's chat template does not write {turns[missing[0] - 1].role} turns in front of a "
                "question: leave them out, or set data.template=plain"
            )

    def _plain(self, turns: Sequence[Turn]) -> str:
        return "".join(turn.content + (self._end_text if turn.role == "assistant" else "\n") for turn in turns)

    @property
    def _end_text(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.end))

    def encode(self, pair: Pair) -> tuple[Example, bool]:
        """Encodes a row; every answer of a conversation that is learnt is a target.

        Returns:
            The example, and whether the first source was cut.

        Raises:
            UserError: the target and later turns leave no room for the first source.
        """
        answers, questions, prompt_room = self._parts(pair)
        rest = sum(map(len, answers)) + sum(map(len, questions)) - 1
        source, prompt = self.truncate(pair.source, prompt_room, pair.context)
        if len(prompt) > self.max_length - rest:
            long = "later turns have" if pair.later else "target has"
            raise UserError(
                f"{pair.origin}: the {long} {rest + 1} tokens, which with the prompt's format is more than "
                f"{self.limit}; only the first source is ever cut: shorten the rest"
                + (f" or raise {self.limited_by}" if self.limited_by else "")
            )
        parts, predict, end = [np.array(prompt, np.int32)], [], len(prompt)
        for turn, answer, question in zip(pair.turns, answers, [*questions, answers[-1][:0]]):
            if turn.learnt:
                predict.append(np.arange(end - 1, end - 1 + len(answer), dtype=np.int32))
            parts += [answer, question]
            end += len(answer) + len(question)
        targets = [answer for turn, answer in zip(pair.turns, answers) if turn.learnt]
        example = Example(np.concatenate(parts)[:-1], np.concatenate(predict), np.concatenate(targets))
        return example, source != pair.source

    def encode_with_demonstration(self, demonstration: Pair, pair: Pair) -> Example:
        """Encodes a row after a demonstration, another row whose answers are shown and are no targets.

        Each is cut as it would be alone, so together they have up to twice `max_length` tokens.
        """
        first, second = (
            dataclasses.replace(row, source=self.truncate(row.source, self._parts(row)[2], row.context)[0])
            for row in (demonstration, pair)
        )
        shown = [dataclasses.replace(turn, learnt=False) for turn in first.turns]
        later = (*shown[1:], dataclasses.replace(second, later=()), *second.later)
        conversation = dataclasses.replace(shown[0], later=later)
        return dataclasses.replace(self, max_length=2 * self.max_length, target_room=0).encode(conversation)[0]

    def _parts(self, pair: Pair) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """Returns the tokens of each answer, those of each later question, and how many the first prompt may have."""
        answers = [np.array(self.target(turn.target), np.int32) for turn in pair.turns]
        questions = [np.array(self.follow_up(turn.source, turn.context, pair.context), np.int32) for turn in pair.later]
        others = sum(map(len, answers[:-1])) + sum(map(len, questions))
        return answers, questions, self.max_length - others - max(len(answers[-1]) - 1, self.target_room)

    def encode_all(self, pairs: Sequence[Pair]) -> tuple[list[Example], int]:
        """Encodes rows in order; also returns how many sources were cut."""
        encoded = [self.encode(pair) for pair in pairs]
        return [example for example, _ in encoded], sum(cut for _, cut in encoded)
