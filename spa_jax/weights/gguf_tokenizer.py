"""Builds tokenizers from GGUF metadata, which has vocabulary, merges and special tokens, and only names split rules."""

import pathlib
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spa_jax.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLITS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama-bpe": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
"""Split rule of `tokenizer.ggml.pre` -> the expressions that split text before byte-pair merging, in order."""

_WHOLE_WORDS_FIRST = {"llama-bpe", "llama-v3", "llama3"}
"""Split rules of vocabularies that begin with BOS and keep a piece whole if it is a token, whatever the merges."""

_COMPOSED = {"qwen2"}
"""Split rules of vocabularies over text in Unicode's composed form (NFC)."""

_WORD_START = "\u2581"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_from_metadata(metadata: Mapping[str, Any], path: pathlib.Path) -> PreTrainedTokenizerFast:
    """Builds the tokenizer that GGUF metadata describes.

    Args:
        metadata: keys and values of the file.
        path: the file's path, for messages.

    Raises:
        UserError: there is no vocabulary, one of an unsupported kind, or one that contradicts itself.
    """
    try:
        return _build(metadata, path)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: its tokenizer cannot be built ({reason}); convert the model to GGUF again."
        ) from error


def _build(metadata: Mapping[str, Any], path: pathlib.Path) -> PreTrainedTokenizerFast:
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UserError(
            f"{path}: tokenizer.ggml.model = {kind!r} is not supported, only {', '.join(builders)}; choose another "
            f"model."
        )
    for key in {"gpt2": ("tokens", "merges", "pre"), "llama": ("tokens", "scores", "token_type")}[kind]:
        if f"tokenizer.ggml.{key}" not in metadata:
            raise UserError(f"{path} lacks tokenizer.ggml.{key}; convert the model with a newer llama.cpp.")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer, begins_with_bos = builders[kind](metadata, path)
    types = metadata.get("tokenizer.ggml.token_type", ())
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED))
    ids = {role: _token_id(metadata, key) for role, key in _SPECIAL.items()}
    special = {role: tokens[index] for role, index in ids.items() if index is not None}
    before = metadata.get("tokenizer.ggml.add_bos_token", begins_with_bos)
    after = metadata.get("tokenizer.ggml.add_eos_token", False)
    edges = [role for role, wanted in (("bos_token", before), ("eos_token", after)) if wanted]
    for role in edges:
        if role not in special:
            raise UserError(f"{path}: text shall get a {role} but the file names none; convert the model again.")
    if edges:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([special["bos_token"]] if before else []), "$A", *([special["eos_token"]] if after else [])],
            special_tokens=[(special[role], ids[role]) for role in edges],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids that end a generation (end of sequence, of turn, of message), ascending."""
    ids = {_token_id(metadata, name) for name in ("eos", "eot", "eom")}
    return tuple(sorted(index for index in ids if index is not None))


def _token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Returns the id of a special token; None where the file names none, or one that its vocabulary has not: files
    write -1, or 4294967295 which is the same without a sign, for no token."""
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return index if type(index) is int and 0 <= index < len(metadata["tokenizer.ggml.tokens"]) else None


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    pairs = zip(tokens, types, strict=False)
    return [AddedToken(token, normalized=False, special=kind == _CONTROL) for token, this in pairs if this == kind]


def _byte_level(metadata: Mapping[str, Any], path: pathlib.Path) -> tuple[Tokenizer, bool]:
    """Builds GPT-2's byte-pair encoding, over bytes as printable characters; says whether text begins with BOS."""
    pre = metadata["tokenizer.ggml.pre"]
    if pre not in SPLITS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre = {pre!r} is not supported, only {', '.join(SPLITS)}; choose another model."
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            merges=[tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]],
            ignore_merges=pre in _WHOLE_WORDS_FIRST,
        )
    )
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[pre]]
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_characters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre in _WHOLE_WORDS_FIRST


def _sentencepiece(metadata: Mapping[str, Any], path: pathlib.Path) -> tuple[Tokenizer, bool]:
    """Builds SentencePiece's byte-pair encoding, where the pair that makes the token of highest score merges first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    mergeable = {token for token, kind in zip(tokens, types, strict=True) if kind in (_NORMAL, _USER_DEFINED)}
    merges = []
    for index in sorted(range(len(tokens)), key=lambda i: (-scores[i], i)):
        token = tokens[index]
        if token in mergeable:
            halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            merges += [(left, right) for left, right in halves if left in mergeable and right in mergeable]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend(_WORD_START)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _WORD_START)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True
