"""The text of a generation as its tokens come, which joined is the text of all tokens together."""

import functools
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class StreamingDetokenizer:
    """Decodes a generation token by token.

    The text of a token may depend on those after it: a character may consist of several tokens, and a run of byte
    tokens such as `<0xF0>` is shown as characters only if all of it is valid. Texts are held back until nothing can
    change them, and then come with the last token of their run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {index for index, token in added.items() if token.special}
        # The tokens before those held back: a decoder treats the first of a text otherwise.
        self._before: list[int] = []
        self._held: list[int] = []
        self._holds_bytes = False
        self._text_at = 0  # the last of the held tokens that has text

    def add(self, token: int) -> list[str]:
        """Adds a token, and returns the texts of the tokens, in their order and one for each, that are certain now."""
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._special:  # decoding skips it, even within a run of bytes
            if not self._held:
                return [""]
            self._held.append(token)
            return []
        is_byte = _BYTE.fullmatch(name) is not None
        texts = self.finish() if self._holds_bytes and not is_byte else []
        self._text_at, self._holds_bytes = len(self._held), is_byte
        self._held.append(token)
        if is_byte or self._held_text().endswith("\N{REPLACEMENT CHARACTER}"):
            return texts
        return texts + self.finish()

    def finish(self) -> list[str]:
        """Returns the texts of the tokens that are held back, as they are if no other follows."""
        if not self._held:
            return []
        texts = [""] * len(self._held)
        texts[self._text_at] = self._held_text()
        self._before, self._held, self._holds_bytes = self._held, [], False
        return texts

    def _held_text(self) -> str:
        return self._decode(self._before + self._held)[len(self._decode(self._before)) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class AnswerText:
    """The text of an answer as its tokens come, up to the one of some texts that is complete first, and ends it.

    Attributes:
        pieces: the texts of its tokens that are certain, one for each.
        is_stopped: whether one of the texts has come; it and what follows are no part of the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None, stop: Sequence[str] = ()) -> None:
        """Begins an answer; a backbone without a tokenizer has answers that nobody reads."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._num_read = 0
        self._held: list[str] = []  # which may be the beginning of a text that ends the answer
        self.pieces: list[str] = []
        self.is_stopped = False

    @functools.cached_property
    def _stream(self) -> StreamingDetokenizer:
        assert self._tokenizer is not None
        return StreamingDetokenizer(self._tokenizer)

    def read(self, tokens: Sequence[int], is_last: bool = False) -> None:
        """Reads on in an answer.

        Args:
            tokens: all of it so far.
            is_last: whether no other token follows.
        """
        for token in tokens[self._num_read :]:
            self._take(self._stream.add(token))
        self._num_read = len(tokens)
        if is_last:
            self._take(self._stream.finish())
            if not self.is_stopped:
                self.pieces += self._held
                self._held = []

    def num_tokens(self, total: int) -> int:
        """Returns how many of so many tokens may be shown: of an answer that a text may end, those whose texts are
        certain."""
        return min(total, len(self.pieces)) if self._stop else total

    def _take(self, texts: list[str]) -> None:
        if self.is_stopped:
            return
        if not self._stop:
            self.pieces += texts
            return
        self._held += texts
        joined = "".join(self._held)
        found = [(at + len(stop), at) for stop in self._stop if (at := joined.find(stop)) >= 0]
        self.is_stopped = bool(found)
        left = min(found)[1] if found else len(joined) - self._overlap(joined)
        while self._held and left >= len(self._held[0]):
            left -= len(self._held[0])
            self.pieces.append(self._held.pop(0))
        if self.is_stopped:
            self.pieces += [self._held[0][:left]] if left else []
            self._held = []

    def _overlap(self, text: str) -> int:
        """Returns how many characters at the end of a text may begin one that ends the answer."""
        longest = max(map(len, self._stop)) - 1
        ends = (text[-count:] for count in range(min(longest, len(text)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)


def token_texts(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], ended: bool = True) -> list[str]:
    """Returns the text that each token adds, which joined are the text of all.

    Args:
        tokenizer: of the backbone.
        tokens: a generation.
        ended: whether no other token follows; else the texts that another one could change are left out.
    """
    stream = StreamingDetokenizer(tokenizer)
    texts = [text for token in tokens for text in stream.add(token)]
    return texts + stream.finish() if ended else texts
