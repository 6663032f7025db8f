"""A tiny run on eight devices that is interrupted after its third step; a process of its own, as `eight_devices`.

python -m tests.training.interrupted_on_eight WORKDIR KEYS_AS_JSON
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import json
import sys
from pathlib import Path

import pytest

from configs import default
from spa_jax.training import run
from spa_jax.training.config import parse
from tests.training.test_run import Spy

STEPS = 3


def main(workdir, keys):
    config = default.get_config()
    config.update_from_flattened_dict(json.loads(keys))
    Spy(pytest.MonkeyPatch(), interrupt_at=STEPS)
    try:
        run.train(parse(config.to_dict()), Path(workdir))
    except KeyboardInterrupt:
        return
    sys.exit("the run was not interrupted")


if __name__ == "__main__":
    main(*sys.argv[1:])
