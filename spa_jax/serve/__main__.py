"""Cloud and device on two machines.

    python -m spa_jax.serve cloud --backbone=NAME --host=0.0.0.0 --tls_cert=FILE --tls_key=FILE --tokens=FILE
    python -m spa_jax.serve device --plugin=DIR --cloud=HOST:8470 --tls --token_file=FILE --prompt="..."
    python -m spa_jax.serve head --backbone=NAME --codec=int8 --output=FILE

The cloud never sees a side parameter; the device needs neither backbone nor tokenizer. With --reply=token it needs the
LM head, which the third command writes, and answers with nothing but the tokens it chose. The cloud logs one JSON
object a line, prompts and activations never. `python -m spa_jax.serve cloud --help` shows the flags of the cloud, and
so on.
"""

import importlib
import sys

from absl import flags

from spa_jax import command, compilation_cache
from spa_jax.errors import UserError

flags.adopt_module_key_flags(compilation_cache)  # --help shows them
ROLES = ("cloud", "device", "head")


def refuse() -> None:
    """Asks which command is meant.

    Raises:
        UserError: always.
    """
    raise UserError("say which half this is: python -m spa_jax.serve cloud, or python -m spa_jax.serve device")


if __name__ == "__main__":
    has_role = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    role = sys.argv.pop(1) if has_role else ""
    if role in ROLES:
        flags_of_role = importlib.import_module(f"spa_jax.serve.{role}_flags")
        flags.adopt_module_key_flags(flags_of_role)
        command.read_flags(flags_of_role.check)
        command.run(importlib.import_module(f"spa_jax.serve.{role}").main)  # its imports are slow
    else:
        command.read_flags(refuse)
