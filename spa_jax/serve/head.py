"""The LM head of a backbone in a file, for devices that answer with tokens."""

from pathlib import Path
from typing import cast

from spa_jax import compilation_cache
from spa_jax.serve.head_flags import BACKBONE, CODEC, OUTPUT
from spa_jax.split.head import save_head
from spa_jax.split.wire import check_codec
from spa_jax.weights.registry import load_backbone


def main() -> None:
    """Writes the backbone's LM head."""
    compilation_cache.keep_programs()
    save_head(Path(cast(str, OUTPUT.value)), load_backbone(BACKBONE.value), check_codec(CODEC.value))
