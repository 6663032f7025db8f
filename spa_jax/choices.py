"""The names that flags and messages choose among. Nothing is imported here, so that commands know their flags before
they import what takes seconds."""

from typing import Literal, get_args

Setting = Literal["spa", "s1", "s2", "s3", "base"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
"""Settings, which say what goes on from the entry, see `spa_jax.models.combine`."""
Codec = Literal["float32", "bfloat16", "float16", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)
"""How the numbers of a message travel."""
ReplyMode = Literal["correction", "token"]
REPLIES: tuple[ReplyMode, ...] = get_args(ReplyMode)
"""The contents of a reply: g, as in the paper, or the id of the token that the device chose itself."""
DTYPES = ("float32", "bfloat16")
"""The dtypes that a backbone can be loaded in."""
