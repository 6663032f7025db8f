"""Other kinds of trainings with as many parameters as the token-wise side network."""

import pytest

from experiments.paper.sizes import WIDEST, trainable_size, with_size
from spa_jax.models.block import LlamaConfig
from spa_jax.training.config import with_defaults

BACKBONE = LlamaConfig(
    vocab_size=97, hidden_size=128, intermediate_size=256, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=32
)


@pytest.mark.parametrize(
    "changes",
    [
        {"setting": "lora"},
        {"setting": "adapter"},
        {"side.taps": "last:4"},
        {"side.kind": "transformer", "side.heads": 2},
    ],
    ids=["LoRA", "Adapter", "other taps", "transformer"],
)
def test_sizes_agree_within_a_step_of_width(changes):
    wanted = trainable_size(with_defaults({}), BACKBONE)
    config = with_defaults(changes)
    found = with_size(config, BACKBONE, wanted)
    assert trainable_size(found, BACKBONE) == pytest.approx(wanted, rel=0.15)
    if config.setting == "lora":
        assert found.peft.alpha / found.peft.rank == pytest.approx(config.peft.alpha / config.peft.rank)


def test_the_width_is_the_nearest_of_all():
    config = with_defaults({"side.taps": "last:2"})
    sizes = {
        width: trainable_size(with_defaults({"side.taps": "last:2", "side.width": width}), BACKBONE)
        for width in (49, 50, 51, 52)
    }
    for width, size in sizes.items():
        assert with_size(config, BACKBONE, size).side.width == width
    assert with_size(config, BACKBONE, sizes[50] + 1).side.width == 50
    assert with_size(config, BACKBONE, sizes[51] - 1).side.width == 51
    assert with_size(config, BACKBONE, 1).side.width == 1
    assert with_size(config, BACKBONE, 10**9).side.width == WIDEST
