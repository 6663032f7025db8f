"""Train a side plugin: python -m spa_jax.train --config=configs/quickstart.py --workdir=DIR [--config.key=value ...]

The same command again resumes from the last completed checkpoint. What DIR holds afterwards is said in README.md.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from spa_jax import command
from spa_jax.errors import UserError
from spa_jax.training.config import parse
from spa_jax.training.run import train

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file; override keys with --config.key=value.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same one again resumes.")


def main() -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("both --config=FILE and --workdir=DIR are needed")
    config = parse(CONFIG.value.to_dict())
    summary = train(config, Path(WORKDIR.value))
    setting = config.setting
    print(
        f"plugin: {Path(WORKDIR.value) / 'plugin'} ({summary['params/trainable_percent']:.2f} % of the backbone's size)"
    )
    print(
        f"held-out loss in nats per token: base {summary['loss/base']:.3f}, {setting} {summary[f'loss/{setting}']:.3f}"
    )
    print(f"consulted share: {summary['router/usage']:.2f}")


if __name__ == "__main__":
    command.run(main)
