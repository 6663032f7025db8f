"""The public functions of `spa_jax`: train, load, evaluate and generate in a few lines of Python."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_jax.data.tasks import Split
from spa_jax.data.text import check_prompt
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.encoders import prompt_encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.sampling import Sampling
from spa_jax.files import path_of
from spa_jax.models.combine import Setting
from spa_jax.scoring.evaluation import EvaluationConfig, evaluate
from spa_jax.training.config import RunConfig, with_defaults
from spa_jax.training.run import train
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.hub import plugin_directory
from spa_jax.weights.peft import PeftPlugin, load_trained
from spa_jax.weights.plugin import Plugin


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """An answer, and where each of its tokens came from.

    Attributes:
        text: the answer without special tokens.
        tokens: its token ids, the end-of-sequence token included if the answer reached it.
        consulted: for each token, whether the device was asked before it was chosen.
    """

    text: str
    tokens: list[int]
    consulted: list[bool]

    @property
    def consulted_share(self) -> float:
        """Share of the tokens for which the device was asked, from 0 to 1."""
        return sum(self.consulted) / len(self.consulted)


def train_plugin(
    config: RunConfig | Mapping[str, Any], workdir: str | Path, *, trackers: Sequence[str] = ()
) -> dict[str, float]:
    """Trains a plugin, or resumes a training, as `python -m spa_jax.train` does.

        >>> from spa_jax import train_plugin
        >>> keys = {"data.train": "mine.jsonl", "train.epochs": 2, "optimizer.learning_rate": 0.01}
        >>> summary = train_plugin(keys, "runs/fast")
        >>> summary["loss/always"] < summary["loss/base"]
        True

    Args:
        config: the keys that differ from the defaults, such as `{"train.epochs": 6}` (nested mappings do as well), or
            a whole `RunConfig`. With no key at all, the embedded persona is trained on SmolLM2-135M.
        workdir: directory of the run, or `gs://bucket/run`. The plugin is written to its folder `plugin`. Another call
            with the same config and directory resumes an interrupted training.
        trackers: `tensorboard` (files in the run's folder `tensorboard`) or `wandb`, which get the metrics too; they
            come with `pip install 'spa_jax[trackers]'`.

    Returns:
        The content of the run's `summary.json`: losses in nats per target token (`loss/base` of the backbone,
        `loss/spa`, `loss/always` with the device asked for every token), the share of tokens for which the device is
        asked (`router/usage`), times and sizes.

    Raises:
        UserError: an unknown key, a bad value, unreadable data, a directory that holds another run, or a tracker that
            cannot be opened.
    """
    config = config if isinstance(config, RunConfig) else with_defaults(config)
    return train(config, path_of(str(workdir)), trackers)


def load_plugin(directory: str | Path) -> Plugin | PeftPlugin:
    """Reads a plugin that a training run wrote, or a LoRA saved by PEFT.

        >>> from spa_jax import load_plugin
        >>> plugin = load_plugin("runs/mine/plugin")
        >>> plugin.backbone, plugin.config.setting
        ('smollm2-135m-instruct', 'spa')

    Args:
        directory: the folder `plugin` of a training run, or a plugin's name on the hub, `org/name`.

    Raises:
        UserError: there is no plugin, or it is damaged or of another format version.
    """
    return load_trained(plugin_directory(str(directory)))


def evaluate_plugin(
    backbone: Backbone,
    plugin: Plugin | PeftPlugin | None,
    task: str,
    output: str | Path,
    *,
    data: str = "",
    columns: str = "",
    split: Split = "test",
    limit: int = 0,
    setting: Setting | None = None,
    threshold: float | None = None,
    budget: float = 0.0,
    beams: int = 4,
    batch_size: int = 16,
    rouge_tokenizer: str = "english",
) -> dict[str, Any]:
    """Measures losses on a task's split, generates answers and scores them, as `python -m spa_jax.evaluate` does.

        >>> from spa_jax import evaluate_plugin, load_backbone, load_plugin
        >>> plugin = load_plugin("runs/mine/plugin")
        >>> backbone = load_backbone(plugin.backbone)
        >>> summary = evaluate_plugin(backbone, plugin, "sciq", "runs/mine/sciq", data="sciq", limit=2, beams=1)
        >>> mean, low, high = summary["score/rougeL"]
        >>> low <= mean <= high
        True

    Args:
        backbone: the backbone that the plugin was trained on.
        plugin: the plugin; None evaluates the backbone alone.
        task: `xsum`, `cnn_dailymail`, `coqa`, `sciq` or `sciq_closed_book`; empty for rows of your own.
        output: directory for `predictions.jsonl` and `evaluation.json`. An interrupted evaluation is resumed.
        data: directory with the task's splits as `train.jsonl`, `validation.jsonl` and `test.jsonl`; by default they
            are read from the Hugging Face hub. Without a task, a file of rows as a training takes them.
        columns: our columns and your file's, such as `source=question,target=answer`.
        split: `train`, `validation` or `test`.
        limit: generate for the first `limit` questions only; 0 is all.
        setting: `spa`, `s1`, `s2`, `s3` or `base`; by default the one the plugin was trained in.
        threshold: ask the device where the router's probability is above this; by default the plugin's own.
        budget: instead of a threshold, the largest share of the validation split's target tokens to ask for.
        beams: width of the beam search; 1 is greedy.
        batch_size: prompts that are generated for at once.
        rouge_tokenizer: what ROUGE counts: `english`, the stems of English words, or `unicode`, any script's words.

    Returns:
        The content of `evaluation.json`. Scores are `[mean, low, high]` with 95 % bootstrap intervals, which
        are infinite (null in the file) where there is a single row.

    Raises:
        UserError: a bad argument, unreadable data, a plugin of another backbone, or an output directory that holds
            another evaluation.
    """
    config = EvaluationConfig(
        task, data, split, limit, setting, threshold, budget,
        beams=beams, batch_size=batch_size, rouge_tokenizer=rouge_tokenizer, columns=columns,
    )  # fmt: skip
    return evaluate(config, backbone, plugin, Path(output))


def generate_text(
    backbone: Backbone,
    plugin: Plugin | PeftPlugin | None,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    setting: Setting | None = None,
    threshold: float | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    beams: int = 0,
) -> GeneratedText:
    """Answers a prompt by one program that holds backbone, router and side network.

        >>> from spa_jax import generate_text, load_backbone, load_plugin
        >>> plugin = load_plugin("runs/mine/plugin")
        >>> backbone = load_backbone(plugin.backbone)
        >>> answer = generate_text(backbone, plugin, "What is thing 3?", max_new_tokens=8)
        >>> len(answer.tokens) <= 8 and 0 <= answer.consulted_share <= 1
        True

    Args:
        backbone: the backbone that the plugin was trained on.
        plugin: the plugin; None lets the backbone answer alone.
        prompt: the question, written as the plugin's training rows were (with the chat template where there is one).
        max_new_tokens: the answer is cut off after so many tokens.
        setting: `spa`, `s1`, `s2`, `s3` or `base`; by default the one the plugin was trained in.
        threshold: ask the device where the router's probability is above this, from 0 (always) to 1 (never); by default
            the plugin's own.
        temperature: of sampling; 0 takes the likeliest token.
        top_k: sample among the `top_k` likeliest tokens; 0 is all of them.
        top_p: sample among the likeliest tokens whose probabilities reach `top_p`.
        seed: of sampling.
        beams: width of a beam search instead of sampling; 0 is none.

    Raises:
        UserError: a prompt that is empty, not text or longer than the backbone's context, a bad argument, or a plugin
            of another backbone.
    """
    check_prompt(prompt)
    encoder = prompt_encoder(backbone, plugin)
    model = FusedModel(backbone, plugin, setting, threshold)
    sampling = Sampling(temperature, top_k, top_p).check()
    search = Beams(beams).check() if beams else None
    (generation,) = model.generate([encoder.prompt(prompt)], max_new_tokens, sampling, seed, search)
    text = backbone.tokenizer.decode(generation.tokens, skip_special_tokens=True)
    return GeneratedText(text, list(generation.tokens), list(generation.consulted))
