"""Descriptions of the cells that the paper's tables are made of: a training, and how it is evaluated.

A *training* is what it changes of its scale's config, and a *cell* what it changes of an evaluation. Their labels name
files and are read by people alone; two that differ must not share one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from experiments.paper.scales import EPOCHS, Scale
from spa_jax.models.peft import PEFT_SETTINGS

NOTHING: Mapping[str, Any] = FrozenDict()
TRANSFORMER: Mapping[str, Any] = {"side.kind": "transformer", "side.heads": 2, "side.init": "pruned"}


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        label: names its files.
        task: whose data it is trained on.
        changes: config keys and their values, beside those of the scale.
        tuned_on: the training whose least held-out loss, at each of LEARNING_RATES, chooses the learning rate; None to
            take the config's.
        same_size: whether the rank of its LoRA, or the width of its Adapter or side network, is chosen such that it has
            as many parameters as the scale's token-wise side network, within 10 %.
        single_questions: whether it is trained on rows of `experiments.paper.single_questions` instead of the task's.
        more_rows: whether it is trained and tested on those of `experiments.paper.more_rows`.
    """

    label: str
    task: str
    changes: Mapping[str, Any] = NOTHING
    tuned_on: "Training | None" = None
    same_size: bool = False
    single_questions: bool = False
    more_rows: bool = False

    @property
    def description(self) -> dict[str, Any]:
        """Describes all but the label in JSON types, for the record of its run."""
        tuned_on = self.tuned_on and self.tuned_on.label
        found = {**vars(self), "changes": dict(self.changes), "tuned_on": tuned_on}
        if not self.more_rows:  # records of before there were more do not have it
            del found["more_rows"]
        return found


@dataclasses.dataclass(frozen=True)
class Cell:
    """An evaluation on a task's test split.

    Attributes:
        label: names its files.
        task: whose questions are asked.
        training: what is evaluated; None for the backbone alone.
        changes: fields of `EvaluationConfig` and their values.
        generates: whether it generates answers, or only measures teacher-forced losses.
    """

    label: str
    task: str
    training: Training | None
    changes: Mapping[str, Any] = NOTHING
    generates: bool = True

    @property
    def setting(self) -> str:
        """The setting: what goes on from the entry."""
        return self.changes.get("setting") or (
            "base" if self.training is None else self.training.changes.get("setting", "spa")
        )

    @property
    def description(self) -> dict[str, Any]:
        """Describes all but the label in JSON types, for the record of its results."""
        training = self.training and self.training.label
        return {**vars(self), "changes": dict(self.changes), "training": training}


def one_shot(task: str) -> Cell:
    """Evaluates the backbone alone, shown one training row before each question."""
    return Cell(f"{task}-base-one-shot", task, None, FrozenDict(setting="base", shots=1))


def plugin_training(
    scale: Scale, task: str, setting: str = "spa", size: str = "full", epochs: int = EPOCHS, offset: bool = False
) -> Training:
    """Trains a token-wise side network. `spa` gives `s1` too, which shares its g, and `s2` gives `s3`.

    Args:
        scale: has the sizes.
        task: whose data.
        setting: `spa` or `s2`.
        size: of the training data, by its name in Table 5.
        epochs: of the whole run.
        offset: whether the router has an offset (`router.offset`), which the paper's has not.
    """
    changes: dict[str, Any] = {"setting": setting, "data.size": scale.sizes[task]["medium"]}
    tuned_on = Training(f"{task}-medium-{setting}", task, FrozenDict(changes))
    words = [task, size, setting]
    changes["data.size"] = scale.sizes[task][size]
    if offset:
        words.append("offset")
        changes["router.offset"] = True
    if epochs != EPOCHS:
        words.append(f"{epochs}epochs")
        changes["train.epochs"] = epochs
    return Training("-".join(words), task, FrozenDict(changes), tuned_on)


def transformer_training(scale: Scale, task: str, setting: str = "spa") -> Training:
    """Trains a side network of LLaMA blocks, pruned from the backbone's, as LST has it."""

    def at(size: str, tuned_on: Training | None = None) -> Training:
        changes = FrozenDict({"setting": setting, "data.size": scale.sizes[task][size], **TRANSFORMER})
        return Training(f"{task}-{size}-{setting}-transformer", task, changes, tuned_on, same_size=True)

    return at("full", at("medium"))


def short_training(scale: Scale, task: str, setting: str, seed: int = 0) -> Training:
    """Trains one of the methods that are compared with LoRA, all on the same rows, lengths and epochs; side networks
    in front of the LM head.

    Args:
        scale: has them.
        task: whose data.
        setting: `lora`, `adapter`, `spa` or `s2`.
        seed: of the run.
    """
    peft = setting in PEFT_SETTINGS

    def at(task: str, size: str, epochs: int, tuned_on: Training | None = None) -> Training:
        changes = {"setting": setting, "data.size": scale.sizes[task][size], **scale.short[task]}
        changes["train.epochs"] = epochs
        if peft:
            changes |= {**scale.short_peft, **_evaluated(scale.peft_eval_every)}
        words = [task, size, setting, *([] if peft else ["short"]), *([] if epochs == EPOCHS else [f"{epochs}epochs"])]
        if seed and tuned_on is not None:
            words.append(f"seed{seed}")
            changes["seed"] = seed
        return Training("-".join(words), task, FrozenDict(changes), tuned_on, same_size=peft)

    epochs = scale.short[task]["train.epochs"]
    return at(task, "full", epochs, at(*(scale.short_tuned_on or (task, "medium", epochs))))


def _evaluated(every: int) -> dict[str, int]:
    return {"train.eval_every": every} if every else {}


def inner_training(scale: Scale, task: str, setting: str, seed: int = 0, labels: str = "") -> Training:
    """Trains the scale's best plugin on the rows, lengths and epochs of `short_training`.

    Args:
        scale: has them.
        task: whose data.
        setting: `spa` or `s2`.
        seed: of the run.
        labels: `router.labels`; empty for the plugin's own.
    """
    changes = {"setting": setting, "data.size": scale.sizes[task]["full"], **scale.short[task], **scale.plugin}
    changes |= _evaluated(scale.inner_eval_every)
    words = [task, "full", setting, "inner"]
    if seed:
        words.append(f"seed{seed}")
        changes["seed"] = seed
    if labels:
        words.append(f"labels-{labels}")
        changes["router.labels"] = labels
    return Training("-".join(words), task, FrozenDict(changes))


def size_training(scale: Scale, task: str, size: str) -> Training:
    """Trains the scale's best plugin on a size of Tables 5 to 7.

    Where rows and epochs are those of `inner_training`, it is that training.
    """
    whole, more = inner_training(scale, task, "spa"), task in scale.more_rows
    rows, epochs = scale.by_size[task][size]
    changes = FrozenDict({**whole.changes, "data.size": rows, "train.epochs": epochs})
    if changes == whole.changes and not more:
        return whole
    words = [task, size, "spa", "inner", *(["more"] if more else [])]
    return Training("-".join(words), task, changes, more_rows=more)


def cell_of(training: Training, setting: str | None = None, budget: float = 0.0, effect: bool = False) -> Cell:
    """Evaluates a training on its task.

    Args:
        training: what is evaluated.
        setting: what goes on from the entry; None for the training's own setting.
        budget: share of the validation tokens that sets the router's threshold; 0 for the plugin's own threshold.
        effect: whether to measure also what the side network changes (Table 4).
    """
    label = training.label + (f"-as-{setting}" if setting else "") + (f"-at-{budget:g}" if budget else "")
    chosen = {"setting": setting, "budget": budget, "effect": effect}
    changes = FrozenDict({name: value for name, value in chosen.items() if value})
    return Cell(label, training.task, training, changes)


def spa_cell(scale: Scale, task: str, size: str = "full") -> Cell:
    """Evaluates SPA in front of the LM head, as Tables 1, 3 and 4 show it."""
    return cell_of(plugin_training(scale, task, size=size), effect=size == "full")


def lst_cell(scale: Scale, task: str) -> Cell:
    """Evaluates S3, the token-wise LST: the side network that was trained as S2's, always asked."""
    return cell_of(plugin_training(scale, task, "s2"), "s3")
