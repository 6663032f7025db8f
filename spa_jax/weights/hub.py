"""Plugins on the Hugging Face hub: read by name, and published with a model card."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from spa_jax.errors import UserError
from spa_jax.files import is_remote, named_path, write_bytes
from spa_jax.models.plugin import count_params
from spa_jax.weights.huggingface import HubUnavailable, download_snapshot, is_hub_name
from spa_jax.weights.peft import load_trained
from spa_jax.weights.plugin import Trained
from spa_jax.weights.registry import REGISTRY

PLUGIN_FILES = ("*.json", "*.safetensors", "README.md")
CARD = "README.md"


def plugin_directory(name: str) -> Path:
    """Returns the directory of a plugin, downloading it on first use.

    Args:
        name: a directory, or a name on the hub, `org/name`.

    Raises:
        UserError: it looks like a hub name, and there is neither such a directory nor such a plugin on the hub.
    """
    directory = named_path(name)
    if os.path.exists(directory) or not is_hub_name(name):
        return directory
    try:
        return download_snapshot(name)
    except HubUnavailable as error:
        raise UserError(f"there is no directory '{name}', and no plugin of that name on the hub: {error}") from error


def check_push(name: str, workdir: Path) -> None:
    """Checks before a run in `workdir` that its plugin can be published under a name.

    Raises:
        UserError: it is no hub name, nobody is logged in, or the run is in a bucket.
    """
    if is_remote(workdir):
        raise UserError(f"a plugin is published from a local directory, and '{workdir}' is none: leave --push out")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push={name} is no name on the hub: write org/name ({error})") from error
    if not is_hub_name(name):
        raise UserError(f"--push={name} is no name on the hub: write org/name")
    if huggingface_hub.get_token() is None:
        raise UserError("publishing on the hub needs a token: log in with `hf auth login`, or set HF_TOKEN")


def push_plugin(directory: Path, name: str, summary: Mapping[str, Any], public: bool = False) -> str:
    """Uploads a plugin and its model card, which is written into the directory too.

    Args:
        directory: of the plugin, as a training run leaves it.
        name: of its repository, `org/name`, which is made where there is none.
        summary: the run's summary.json, for the card.
        public: whether a repository that is made can be seen by everybody. What a plugin has learned of a person can
            be got out of it again.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    card = model_card(load_trained(directory), name, summary)
    write_bytes(directory / CARD, str(card).encode(errors="backslashreplace"))  # the backbone may be any directory
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=directory, allow_patterns=list(PLUGIN_FILES), commit_message="Upload a plugin"
        )
    except Exception as error:  # which ones depends on the release of huggingface_hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot publish '{directory}' as {name} ({reason}): check name, token and network") from error
    return str(address)


def model_card(trained: Trained[Any], name: str, summary: Mapping[str, Any]) -> huggingface_hub.ModelCard:
    """Describes a plugin for the people who find it on the hub.

    Args:
        trained: the plugin.
        name: of its repository.
        summary: the run's summary.json.
    """
    source = REGISTRY.get(trained.backbone)
    base = source.hub if source else trained.backbone if is_hub_name(trained.backbone) else None
    data = huggingface_hub.ModelCardData(
        base_model=base, library_name="spa_jax", tags=["spa_jax", "side-plugin", trained.config.setting]
    )
    losses = {"the backbone alone": "loss/base", "with it": f"loss/{trained.config.setting}"}
    rows = [f"| {said} | {summary[key]:.3f} |" for said, key in losses.items() if key in summary]
    text = f"""---
{data.to_yaml()}
---

# {name.partition("/")[2]}

A `{trained.config.setting}` of {count_params(trained.params):,} parameters for the frozen model
`{base or trained.backbone}`, trained with `spa_jax`: the model runs in the cloud, and this runs on its owner's device.

    python -m spa_jax.generate --plugin={name} --prompt="..."

| held-out loss, nats per target token | |
|---|---|
{chr(10).join(rows)}

Device asked for {100 * summary.get("router/usage", 1.0):.0f} % of the held-out tokens. Prompts are in the format
`{trained.template}`; the backbone's fingerprint is `{trained.fingerprint}`.
"""
    return huggingface_hub.ModelCard(text)
