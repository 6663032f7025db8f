"""Train a side plugin: python -m spa_jax.train --config=configs/quickstart.py --workdir=DIR [--config.key=value ...]

The same command again resumes from the last completed checkpoint. docs/training.md lists what a run writes to DIR.
"""

from absl import flags
from ml_collections import ConfigDict, config_flags

from spa_jax import command, compilation_cache
from spa_jax.errors import UserError
from spa_jax.files import path_of
from spa_jax.training.config import RunConfig, parse
from spa_jax.training.processes import is_main_process
from spa_jax.training.run import train
from spa_jax.training.trackers import TRACKERS
from spa_jax.weights.hub import check_push, push_plugin

flags.adopt_module_key_flags(compilation_cache)  # --help shows them
CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file; override keys with --config.key=value.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or gs://...; the same one again resumes.")
TRACKER = flags.DEFINE_multi_enum("tracker", [], list(TRACKERS), "Shows the metrics there too; may be repeated.")
PUSH = flags.DEFINE_string("push", "", "Publish the plugin on the Hugging Face hub in the end, as org/name.")
PUBLIC = flags.DEFINE_bool("public", False, "push: for everybody to see; by default the repository is private.")


def read_config() -> RunConfig:
    """The config file with its overrides.

    Raises:
        UserError: the file cannot be read, or what it says is no config.
    """
    if CONFIG.value is None:
        raise UserError("--config=FILE is needed")
    try:
        getattr(CONFIG.value, "to_dict", None)  # the first use says whether the file could be read
    except OSError as error:
        raise UserError(command.explain_unread_config(error)) from error
    if not isinstance(CONFIG.value, ConfigDict):
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise UserError(f"cannot use the config '{path}': its get_config() returns no ConfigDict")
    return parse(CONFIG.value.to_dict())


def main() -> None:
    compilation_cache.keep_programs()
    if CONFIG.value is None or not WORKDIR.value:
        raise UserError("both --config=FILE and --workdir=DIR are needed")
    config = read_config()
    workdir = path_of(WORKDIR.value)
    if PUSH.value:
        check_push(PUSH.value, workdir)
    summary = train(config, workdir, TRACKER.value)
    setting = config.setting
    print(f"plugin: {workdir / 'plugin'} ({summary['params/trainable_percent']:.2f} % of the backbone's size)")
    print(
        f"held-out loss in nats per token: base {summary['loss/base']:.3f}, {setting} {summary[f'loss/{setting}']:.3f}"
    )
    print(f"consulted share: {summary['router/usage']:.2f}")
    if PUSH.value and is_main_process():
        print(f"published: {push_plugin(workdir / 'plugin', PUSH.value, summary, PUBLIC.value)}")


if __name__ == "__main__":
    command.run(main, resumable=True)
