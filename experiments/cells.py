"""The cells that the paper's tables are made of: a training, and what is evaluated of it. Each is done once.

A finished cell is `cells/NAME.json` and `predictions/NAME.jsonl` in the results of its scale, and a finished training
`trainings/NAME.json`; whatever stands there is not done again, with or without the run it came from.
"""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

from configs import default
from experiments.ablation import hardware, matched, size_of
from experiments.scales import BATCH_SIZE, BEAMS, EPOCHS, LEARNING_RATES, Scale
from spa_jax.decoding.prompt_store import PromptStore
from spa_jax.errors import UserError
from spa_jax.files import write_bytes, write_json
from spa_jax.models.combine import Setting
from spa_jax.models.peft import PEFT_SETTINGS, rank_for
from spa_jax.scoring.evaluation import PREDICTIONS, EvaluationConfig, evaluate, summarize
from spa_jax.scoring.predictions import Prediction, read_predictions
from spa_jax.training.config import RunConfig, parse
from spa_jax.training.run import peft_config, train
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import load_trained
from spa_jax.weights.registry import load_backbone

log = logging.getLogger("spa_jax.experiments")

PROMPTS_GIB = 8.0
"""Most memory for prompts that have run: the cells of one task ask the same questions."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained: `spa` gives `s1` too, since they share one g under `improvement`, and `s2` gives `s3`.

    Attributes:
        task, size: of the data.
        setting: `spa`, `s2`, `lora` or `adapter`.
        kind: of the side network.
        offset: `router.offset`, which the paper does not have.
        short: rows and epochs of the baselines that train through the backbone, to stand beside them.
        epochs: of the whole run.
    """

    task: str
    size: str = "full"
    setting: str = "spa"
    kind: str = "tokenwise"
    offset: bool = False
    short: bool = False
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        parts = [self.task, self.size, self.setting]
        parts += [] if self.kind == "tokenwise" else [self.kind]
        parts += [word for word, said in (("offset", self.offset), ("short", self.short)) if said]
        return "-".join(parts + ([] if self.epochs == EPOCHS else [f"{self.epochs}epochs"]))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is evaluated on a task's test split.

    Attributes:
        task: by name.
        setting: what enters the LM head.
        training: of the plugin; None for the backbone alone.
        shots: training rows shown before each question.
        budget: share of the validation tokens that sets the router's threshold; 0 for the plugin's own threshold.
    """

    task: str
    setting: str
    training: Training | None = None
    shots: int = 0
    budget: float = 0.0

    @property
    def name(self) -> str:
        if self.training is None:
            return f"{self.task}-base" + ("-one-shot" if self.shots else "")
        trained = self.training.setting
        as_what = "" if self.setting == trained else f"-as-{self.setting}"
        return self.training.name + as_what + (f"-at-{self.budget:g}" if self.budget else "")


class Bench:
    """Where the cells of one scale are made and kept."""

    def __init__(self, scale: Scale, data: str, workdir: Path, results: Path, run: bool = True) -> None:
        """Args:
        scale: of the experiments.
        data: directory with a directory for each task; empty for the hub.
        workdir: of training runs and evaluations under way.
        results: directory of all scales' results.
        run: whether to do what is not done yet.
        """
        self.scale, self._data, self.may_run = scale, data, run
        self._workdir, self.results = workdir / scale.name, results / scale.name
        self._backbone: Backbone | None = None
        self._prompts = PromptStore(PROMPTS_GIB)
        self._results: dict[Cell, dict[str, Any]] = {}  # bootstrapped once, though several tables show them

    @property
    def backbone(self) -> Backbone:
        """Loaded when first needed: tables that are done need none."""
        if self._backbone is None:
            self._backbone = load_backbone(self.scale.backbone, self.scale.dtype)
        return self._backbone

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What the cell measured, its scores from its predictions; None where it is not done and may not be run."""
        if cell not in self._results:
            if not self.done(cell):
                if not self.may_run:
                    return None
                self._evaluate(cell, self._path(cell))
            self._results[cell] = {**_read(self._path(cell)), **summarize(self.predictions(cell))}
        return self._results[cell]

    def predictions(self, cell: Cell) -> list[Prediction]:
        """What the cell's model said, of a cell that is done."""
        return read_predictions(self._predictions(cell))[1]

    def summary(self, training: Training) -> dict[str, Any] | None:
        """What the training said of itself; None where it is not done and may not be run."""
        path = self._summary(training.name)
        if not path.exists():
            if not self.may_run:
                return None
            self.train(training)
        return _read(path)

    def hardware(self) -> str:
        """What the scale's measurements ran on, which need not be where their tables are written."""
        measured = [_read(path) for path in self.results.glob("*/*.json")]
        found = {each["hardware"] for each in measured if "hardware" in each}
        return "; ".join(sorted(found)) or hardware()

    def train(self, training: Training) -> Path:
        """The run's directory, with its plugin."""
        rate = self._rate(training)
        return self._train_at(training, rate, training.name)

    def config(self, training: Training, rate: float) -> RunConfig:
        """Of the run; trainable counts are those of the token-wise side network, within 10 %."""
        scale, config = self.scale, default.get_config()
        config.update(
            backbone=scale.backbone,
            dtype=scale.dtype,
            setting=training.setting,
            side={"width": scale.side_width},
            router={"offset": training.offset},
            data={
                "task": training.task,
                "directory": self.directory(training.task),
                "size": scale.sizes[training.task][training.size],
                "eval_size": scale.eval_size,
                "max_length": self._max_length(training),
            },
            train={"epochs": training.epochs, "batch_size": BATCH_SIZE, "log_every": 100},
            optimizer={"learning_rate": rate},
        )
        plain = size_of(parse({**config.to_dict(), "setting": "spa"}), self.backbone)
        if training.setting in PEFT_SETTINGS:
            peft = rank_for(peft_config(parse(config.to_dict())), self.backbone.config, plain)
            config.peft.update(rank=peft.rank, alpha=peft.alpha, width=peft.rank)
            config.update(scale.through_config)
        if training.kind == "transformer":
            config.side.update(kind="transformer", heads=2, init="pruned")
            return matched(parse(config.to_dict()), self.backbone, plain)
        return parse(config.to_dict())

    def kept(self, path: Path) -> dict[str, Any] | None:
        """What a measurement has left there, if anything."""
        return _read(path) if path.exists() else None

    def done(self, cell: Cell) -> bool:
        """Whether `result` has nothing to run."""
        return self._path(cell).exists()

    def _evaluate(self, cell: Cell, path: Path) -> None:
        plugin = None
        if cell.training is not None:
            plugin = load_trained(self.train(cell.training) / "plugin")
        log.info("cell %s", cell.name)
        config = EvaluationConfig(
            cell.task, self.directory(cell.task), limit=self.scale.questions[cell.task], setting=_setting(cell),
            budget=cell.budget, beams=BEAMS, shots=cell.shots, max_length=self._max_length(cell.training),
            effect=cell == Cell(cell.task, "spa", Training(cell.task)),  # Table 4
        )  # fmt: skip
        began, output = time.perf_counter(), self._workdir / "evaluations" / cell.name
        summary = evaluate(config, self.backbone, plugin, output, self._prompts)
        seconds = time.perf_counter() - began
        write_bytes(self._predictions(cell), (output / PREDICTIONS).read_bytes())
        kept = {key: value for key, value in summary.items() if not key.startswith("score/")}
        write_json(path, {"cell": cell.name, "hardware": hardware(), "time/evaluate_seconds": seconds, **kept})

    def _rate(self, training: Training) -> float:
        """The learning rate whose run on the medium size has the least held-out loss."""
        on = dataclasses.replace(training, size="medium", offset=False, epochs=EPOCHS)
        if training.setting in PEFT_SETTINGS or training.short:
            chosen = self.scale.through_rates
            task, size, epochs = chosen or (training.task, "medium", training.epochs)
            on = dataclasses.replace(training, task=task, size=size, epochs=epochs)
        path = self.results / "rates" / f"{on.name}.json"
        if not path.exists():
            losses = {}
            for rate in LEARNING_RATES:
                name = f"{on.name}-{rate:g}"
                if not self._summary(name).exists():
                    self._train_at(on, rate, name)
                losses[f"{rate:g}"] = _read(self._summary(name))[f"loss/{on.setting}"]
            write_json(path, {"chosen_on": on.name, "held_out_loss": losses})
        losses = _read(path)["held_out_loss"]
        return float(min(losses, key=lambda rate: losses[rate]))

    def _train_at(self, training: Training, rate: float, name: str) -> Path:
        run, kept = self._workdir / "trainings" / f"{training.name}-{rate:g}", self._summary(name)
        if kept.exists() and (run / "plugin").is_dir():  # several cells are of one training
            return run
        log.info("training %s at %g", training.name, rate)
        summary = train(self.config(training, rate), run)
        write_json(
            kept,
            {"training": name, "learning_rate": rate, "epochs": training.epochs, "hardware": hardware(), **summary},
        )
        return run

    def _max_length(self, training: Training | None) -> int:
        through = training is not None and (training.setting in PEFT_SETTINGS or training.short)
        return self.scale.through_length if through else 0

    def directory(self, task: str) -> str:
        """Of the task's splits as JSON lines; empty for the hub."""
        return str(Path(self._data) / task.removesuffix("_closed_book")) if self._data else ""

    def _summary(self, name: str) -> Path:
        return self.results / "trainings" / f"{name}.json"

    def _path(self, cell: Cell) -> Path:
        return self.results / "cells" / f"{cell.name}.json"

    def _predictions(self, cell: Cell) -> Path:
        return self.results / "predictions" / f"{cell.name}.jsonl"


def _setting(cell: Cell) -> Setting | None:
    """None where the trained parameters say it themselves."""
    return None if cell.training is not None and cell.setting == cell.training.setting else cell.setting  # type: ignore


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}): delete it, and it will be made again") from error
