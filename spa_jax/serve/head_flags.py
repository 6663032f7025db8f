"""Flags of `python -m spa_jax.serve head`."""

from absl import flags

from spa_jax.choices import CODECS
from spa_jax.errors import UserError

BACKBONE = flags.DEFINE_string("backbone", "smollm2-135m-instruct", "Name of a backbone, its directory or .gguf file.")
CODEC = flags.DEFINE_enum("codec", "float32", CODECS, "How numbers are written.")
OUTPUT = flags.DEFINE_string("output", None, "The file to write.")


def check() -> None:
    """Refuses flags that no model is needed to refuse.

    Raises:
        UserError: such a flag.
    """
    if OUTPUT.value is None:
        raise UserError("name the file to write with --output=FILE")
