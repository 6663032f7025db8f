"""The text of a generation as its tokens come, which joined is the text of all tokens together."""

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
