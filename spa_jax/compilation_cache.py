"""Compiled programs on disk, where a command that is run again finds them instead of compiling once more.

Imported by the commands, which have its flag then.
"""

import hashlib
import logging
import os
import platform
from pathlib import Path

from absl import flags

from spa_jax.errors import UserError
from spa_jax.files import named_path

log = logging.getLogger(__name__)

COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "",
    "Directory of compiled programs, for later runs; none keeps none. By default ~/.cache/spa_jax/compiled.",
)
MOST_BYTES = 2**32
"""The largest size of one directory; the programs that were used least recently go first."""


def keep_programs() -> None:
    """Keeps what is compiled from now on in `--compilation_cache`, by default in `spa_jax.weights.registry`'s cache
    directory, unless `$JAX_COMPILATION_CACHE_DIR` names another one.

    Machines whose processors differ have directories of their own, even where they share a file system: the code is
    made for one processor's instructions.

    Raises:
        UserError: the directory that was named cannot be written.
    """
    import jax  # this module has a flag, and is imported before flags are read

    from spa_jax.weights.registry import cache_directory

    named = COMPILATION_CACHE.value
    if named == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not named and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    directory = (named_path(named) if named else cache_directory() / "compiled") / _processor()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        if named:
            raise UserError(f"--compilation_cache: {directory} cannot be written; name another directory, or none")
        log.warning("Compiled programs are not kept, since %s cannot be written (--compilation_cache)", directory)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a second of small programs is one too


def _processor() -> str:
    """Names the kind of this machine's processor, after its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        instructions = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    except OSError:
        instructions = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(repr(instructions).encode()).hexdigest()[:12]}"
