"""Every config key is read, or refused by name."""

import importlib
from pathlib import Path

import pytest

from configs import default
from spa_jax.data.tasks import TASKS
from spa_jax.errors import UserError
from spa_jax.training.config import parse

ROOT = Path(default.__file__).parents[1]
CONFIGS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.glob("configs/**/*.py"))]


@pytest.mark.parametrize("module", CONFIGS)
def test_every_config_file_is_valid(module):
    parse(importlib.import_module(module).get_config().to_dict())


@pytest.mark.parametrize("task", [task for task in TASKS if task != "sciq_closed_book"])
def test_the_papers_configs_take_another_backbone(task):
    module = importlib.import_module(f"configs.paper.{task}")
    config = parse(module.get_config("smollm2-135m-instruct").to_dict())
    assert (config.backbone, config.data.task) == ("smollm2-135m-instruct", task)
    assert parse(module.get_config().to_dict()).backbone == "llama-2-7b"


def changed(**keys):
    config = default.get_config().to_dict()
    for name, value in keys.items():
        *parents, last = name.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rate": 1.0}, "unknown config key learning_rate; keys here are backbone, dtype, "),
        ({"optimizer__momentum": 0.9}, "unknown config key optimizer.momentum; keys here are optimizer.learning_rate"),
        ({"setting": "s4"}, "config key setting is 's4'; choices are 'spa', 's1', 's2', 's3'"),
        ({"setting": "base"}, "config key setting is 'base'"),
        ({"dtype": "float16"}, "config key dtype is 'float16'; choices are"),
        ({"side__kind": "mamba"}, "config key side.kind is 'mamba'; choices are"),
        ({"data__template": "alpaca"}, "config key data.template is 'alpaca'; choices are 'auto', 'chat', 'plain'"),
        ({"data__date": "yesterday"}, "data.date is 'yesterday': write a date such as 2024-07-26"),
        ({"data__date": 20240726}, "data.date is '20240726'"),
        ({"seed": 1.5}, "config key seed is 1.5, but must be of type int"),
        ({"train__epochs": 10**30}, "config key train.epochs is larger than 2147483647"),
        ({"peft__alpha": 10**400}, "config key peft.alpha is larger than 2147483647"),
        ({"seed": True}, "config key seed is True, but must be of type int"),
        (
            {"optimizer__learning_rate": "fast"},
            "config key optimizer.learning_rate is 'fast', but must be of type float",
        ),
        ({"tap_cache__enabled": 1}, "config key tap_cache.enabled is 1, but must be of type bool"),
        ({"train": 3}, "config key train must hold keys of its own, not 3"),
        ({"train__batch_size": 8, "train__accumulate": 3}, "out of range: train.accumulate"),
        ({"router__threshold": 1.1, "train__epochs": 0}, "out of range: router.threshold, train.epochs "),
        ({"optimizer__learning_rate": float("nan")}, "out of range: optimizer.learning_rate"),
        ({"optimizer__beta1": 1.0}, "out of range: optimizer.beta1"),
        ({"optimizer__weight_decay": -1.0}, "out of range: optimizer.weight_decay"),
        ({"optimizer__final_fraction": 2.0}, "out of range: optimizer.final_fraction"),
        ({"router__margin": float("inf")}, "out of range: router.margin"),
        ({"peft__rank": 0, "peft__width": 0}, "out of range: peft.rank, peft.width"),
        ({"peft__alpha": 0.0}, "out of range: peft.alpha"),
        ({"peft__remat": "some"}, "config key peft.remat is 'some'; choices are 'none', 'full', 'dots'"),
        ({"peft__targets": "q,w"}, "peft.targets is 'q,w': write some of q,k,v,o,gate,up,down, each once"),
        ({"peft__targets": "q,q"}, "peft.targets is 'q,q'"),
        ({"setting": "lora", "side__init": "pruned"}, "setting 'lora' has no side network: leave side.kind and side.i"),
        ({"setting": "adapter", "side__kind": "transformer"}, "setting 'adapter' has no side network"),
        (
            {"side__edits": "all", "side__entry": "2", "router__offset": True},
            "router.offset enters where new tokens are predicted: set side.edits to 'targets'",
        ),
        ({"side__edits": "some"}, "config key side.edits is 'some'; choices are 'targets', 'all'"),
        ({"router__labels": "never"}, "config key router.labels is 'never'; choices are 'router', 'always'"),
        ({"tap_cache__dtype": "int8"}, "config key tap_cache.dtype is 'int8'; choices are"),
        ({"setting": "lora", "router__budget": 0.5}, "setting 'lora' has no router: leave router.objective"),
        ({"setting": "adapter", "router__offset": True}, "setting 'adapter' has no router"),
    ],
)
def test_what_is_no_config_is_refused_by_name(keys, message):
    with pytest.raises(UserError) as refused:
        parse(changed(**keys))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_key_is_named():
    config = changed()
    del config["router"]["margin"]
    with pytest.raises(UserError, match=r"config key router\.margin is missing"):
        parse(config)


def test_whole_numbers_do_for_rates():
    assert parse(changed(optimizer__learning_rate=1)).optimizer.learning_rate == 1.0
