"""Special tokens of a tokenizer, such as `<|im_end|>`, and texts in which their names are nothing but text."""

import functools
import json
import re
import weakref
from collections.abc import Iterable
from typing import cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from spa_jax.errors import UserError

_FIRST = 0xF0000
"""The first of the private characters that stand for names of special tokens; no text means anything by them."""


class SpecialTokens:
    """The names of a tokenizer's special tokens.

    What a user writes is put into a chat template with its names hidden, each by a private character. Of what the
    template then writes, `encode` makes tokens in which the template's own names are special tokens, and the hidden
    ones text. Other text becomes the tokens that the tokenizer itself makes of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = weakref.proxy(tokenizer)
        self._ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._characters = {name: chr(_FIRST + number) for number, name in enumerate(self._ids)}
        self._shown = {character: name for name, character in self._characters.items()}
        self._name, self._character, self._either = map(
            _any_of, (self._characters, self._shown, {**self._characters, **self._shown})
        )
        normal = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.normalized
        ]
        self._normalizer = tokenizer.backend_tokenizer.normalizer if normal else None
        if self._normalizer is not None:
            self._normal_name = _any_of({*normal, *map(self._normalizer.normalize_str, normal)})

    def hide(self, text: str) -> str:
        """Replaces the names in a text by characters that stand for them.

        Raises:
            UserError: the tokenizer, which normalises texts before it looks for names, would still find one.
        """
        hidden = self._name.sub(lambda found: self._characters[found[0]], text)
        if self._normalizer is not None and (found := self._normal_name.search(self._normalizer.normalize_str(hidden))):
            raise UserError(f"this tokenizer reads a part of the text as '{found[0]}', which is no text: leave it out")
        return hidden

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """Returns the token ids of a text in which names may be hidden.

        Args:
            text: the text.
            begin: whether it is a whole prompt, to which the tokenizer adds what prompts begin with.

        Raises:
            UserError: the tokenizer's vocabulary has a name as a word of its own, so that it cannot be text.
        """
        if not self._character.search(text):
            return list(self._tokenizer(text, add_special_tokens=begin)["input_ids"])
        tokenizer, special = self._renamed
        swapped = self._either.sub(lambda found: self._characters.get(found[0]) or self._shown[found[0]], text)
        tokens = tokenizer.encode(swapped, add_special_tokens=begin)
        added = {index for index, is_added in zip(tokens.ids, tokens.special_tokens_mask) if is_added}
        for token in set(tokens.ids) - special.keys() - added:
            if token in self._ids.values():
                raise UserError(f"'{tokenizer.id_to_token(token)}' is no text for this tokenizer: leave it out")
        return [special.get(token, token) for token in tokens.ids]

    @functools.cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """The same tokenizer, whose special tokens have the hidden names, and its ids of added tokens -> ours."""
        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        ids = {}
        for token in described["added_tokens"]:
            token["content"] = self._characters.get(token["content"], token["content"])
            ids[token["content"]] = token["id"]
        tokenizer = Tokenizer.from_str(json.dumps(described))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, {cast(int, tokenizer.token_to_id(name)): index for name, index in ids.items()}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Makes a pattern that finds the longest of some texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


_KNOWN: "weakref.WeakKeyDictionary[PreTrainedTokenizerFast, SpecialTokens]" = weakref.WeakKeyDictionary()


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    """Returns the special tokens of a tokenizer, found once."""
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = SpecialTokens(tokenizer)
    return _KNOWN[tokenizer]
