"""Where the cells of one scale are made and kept, each once.

A finished training is `trainings/LABEL.json` in the results of its scale, a finished cell `cells/LABEL.json` and, where
it generates, `predictions/LABEL.jsonl.gz`. What stands there is not done again, with or without the run it came from.
"""

import gzip
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper import more_rows, single_questions
from experiments.paper.cells import Cell, Training
from experiments.paper.scales import BEAMS, BUDGET, CLOSED_BOOK, LEARNING_RATES, Scale
from experiments.paper.sizes import trainable_size, with_size
from experiments.record import hardware
from spa_jax.data.row_formats import read_pairs
from spa_jax.decoding.prompt_store import PromptStore
from spa_jax.errors import UserError
from spa_jax.files import write_bytes, write_json
from spa_jax.scoring.bootstrap import estimate
from spa_jax.scoring.evaluation import PREDICTIONS, EvaluationConfig, evaluate, summarize
from spa_jax.scoring.predictions import Prediction, read_predictions
from spa_jax.training.config import RunConfig, with_defaults
from spa_jax.training.methods import recipe_for
from spa_jax.training.rows import make_encoder
from spa_jax.training.run import train
from spa_jax.training.scorer import Scorer
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.peft import load_trained
from spa_jax.weights.plugin import Trained
from spa_jax.weights.registry import load_backbone

log = logging.getLogger("spa_jax.experiments")

PROMPTS_GIB = 8.0
"""Most memory for prompts that have run: the cells of one task ask the same questions."""


class CellStore:
    """Results of the cells of one scale; what is missing is trained and evaluated when it is asked for."""

    def __init__(self, scale: Scale, data: str, workdir: Path, results: Path, run: bool = True) -> None:
        """Opens the store; nothing is read yet.

        Args:
            scale: of the experiments.
            data: directory with a directory for each task; empty for the hub.
            workdir: holds training runs and evaluations under way.
            results: directory of all scales' results.
            run: whether to do what is not done yet.
        """
        self.scale, self._data, self.may_run = scale, data, run
        self._workdir, self.results = workdir / scale.name, results / scale.name
        self._backbones: dict[str, tuple[Backbone, PromptStore]] = {}
        self._results: dict[Cell, dict[str, Any]] = {}  # bootstrapped once, though several tables show them

    @property
    def backbone(self) -> Backbone:
        """The scale's backbone, loaded when first needed: tables that are done need none."""
        return self._loaded(None)[0]

    def _loaded(self, training: Training | None) -> tuple[Backbone, PromptStore]:
        """Returns the backbone in the dtype of a training, and the prompts that have run on it."""
        config = {**self.scale.config, **({} if training is None else training.changes)}
        dtype = config["dtype"]
        if dtype not in self._backbones:
            self._backbones[dtype] = load_backbone(config["backbone"], dtype), PromptStore(PROMPTS_GIB)
        return self._backbones[dtype]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Returns the cell's metrics, scores as `[mean, low, high]`; None where it is not done and may not be run.

        Raises:
            UserError: its record is damaged, or of another cell.
        """
        if cell not in self._results:
            if not self.done(cell):
                if not self.may_run:
                    return None
                self._evaluate(cell)
            self._results[cell] = self._kept(cell)  # from the files also when just made: their scores are rounded
        return self._results[cell]

    def _kept(self, cell: Cell) -> dict[str, Any]:
        record = self.record(cell)
        if not cell.generates:
            return record
        predictions = self.predictions(cell)
        before = {"nats": record.get(f"loss/{cell.setting}")}  # of a record that has no interval of it
        return {**before, **record, **summarize(predictions), "share": consulted_share(predictions)}

    def record(self, cell: Cell) -> dict[str, Any]:
        """Returns what is kept of a cell that is done, beside its predictions.

        Raises:
            UserError: it is damaged, or of another cell.
        """
        return _read(self._path("cells", cell.label), cell.description)

    def predictions(self, cell: Cell) -> list[Prediction]:
        """Returns the generations of a cell that is done."""
        packed = self._path("predictions", cell.label, ".jsonl.gz")
        return read_predictions(packed if packed.exists() else packed.with_suffix(""))[1]

    def summary(self, training: Training) -> dict[str, Any] | None:
        """Returns the record of a training; None where it is not done and may not be run.

        Raises:
            UserError: the record is damaged, or of another training.
        """
        if not self.trained(training):
            if not self.may_run:
                return None
            self.train(training)
        return _read(self._path("trainings", training.label), training.description)

    def hardware(self, folder: str = "") -> str:
        """Names what the scale's measurements ran on, which need not be where their tables are written.

        Args:
            folder: with which the measured cells' labels begin, with a slash; empty for labels without one.
        """
        measured = [_read(path) for path in self.results.glob(f"*/{folder}*.json")]
        found = {each["hardware"] for each in measured if "hardware" in each}
        return "; ".join(sorted(found)) or hardware()

    def notes(self, rows: Iterable[tuple[str, Cell | None]]) -> list[str]:
        """Returns what the records of trainings remark on them, each remark once, after the names of its rows."""
        remarks: dict[str, list[str]] = {}
        for row, cell in rows:
            if cell is not None and cell.training is not None and self.trained(cell.training):
                record = _read(self._path("trainings", cell.training.label), cell.training.description)
                if "note" in record:
                    remarks.setdefault(record["note"], []).append(row)
        return [f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in remarks.items()]

    def train(self, training: Training) -> Path:
        """Returns the directory of the training's run, with its plugin, after running what is missing of it."""
        return self._train_at(training, self._learning_rate(training), training.label)

    def config(self, training: Training, learning_rate: float | None = None) -> RunConfig:
        """Returns the config of a training's run.

        Args:
            training: what it changes.
            learning_rate: in place of the config's.
        """
        directory = self.directory(training.task, training.more_rows)
        data: dict[str, Any] = {"data.task": training.task, "data.directory": directory}
        if training.single_questions:
            rows = self.single_questions(training.task)
            data = {"data.train": str(rows / "train.jsonl"), "data.eval": str(rows / "validation.jsonl")}
        rate = {} if learning_rate is None else {"optimizer.learning_rate": learning_rate}
        config = with_defaults({**self.scale.config, **data, **training.changes, **rate})
        if not training.same_size:
            return config
        backbone = self.backbone.config
        return with_size(config, backbone, trainable_size(with_defaults(self.scale.config), backbone))

    def kept(self, path: Path) -> dict[str, Any] | None:
        """Returns what a measurement has left there, if anything."""
        return _read(path) if path.exists() else None

    def done(self, cell: Cell) -> bool:
        """Says whether `result` has nothing to run."""
        return self._path("cells", cell.label).exists()

    def trained(self, training: Training) -> bool:
        """Says whether `summary` has nothing to run."""
        return self._path("trainings", training.label).exists()

    def missing_runs(self, training: Training) -> dict[str, Training]:
        """Returns what `summary` has to run, by label: the training, and those that choose its learning rate."""
        runs = {} if self.trained(training) else {training.label: training}
        on = training.tuned_on
        if runs and on is not None and not self._path("rates", on.label).exists():
            runs |= {label: on for label in trials(on) if not self._path("trainings", label).exists()}
        return runs

    def _evaluate(self, cell: Cell) -> None:
        """Runs a cell and keeps its record."""
        plugin = None if cell.training is None else load_trained(self.train(cell.training) / "plugin")
        log.info("cell %s", cell.label)
        began, output = time.perf_counter(), self._workdir / "evaluations" / cell.label
        if cell.generates:
            max_length = 0 if cell.training is None else cell.training.changes.get("data.max_length", 0)
            fields = {"beams": BEAMS, "max_length": max_length, **cell.changes}
            more = cell.training is not None and cell.training.more_rows
            config = EvaluationConfig(cell.task, self.directory(cell.task, more), **fields)
            backbone, prompts = self._loaded(cell.training)
            found = evaluate(config, backbone, plugin, output, prompts)
            found["share"] = consulted_share(read_predictions(output / PREDICTIONS)[1])
            packed = gzip.compress((output / PREDICTIONS).read_bytes(), mtime=0)
            write_bytes(self._path("predictions", cell.label, ".jsonl.gz"), packed)
        else:
            found = self._losses(cell, plugin)
        kept = {key: value for key, value in found.items() if key == "nats" or not isinstance(value, list)}
        record = {
            "cell": cell.label,
            "description": cell.description,
            "hardware": hardware(),
            "time/evaluate_seconds": time.perf_counter() - began,
            **kept,  # the other intervals are of the predictions
        }
        write_json(self._path("cells", cell.label), record)

    def _losses(self, cell: Cell, trained: Trained | None) -> dict[str, float]:
        """Measures teacher-forced metrics on single questions: at the plugin's own threshold, with a router also at a
        share of BUDGET of the test tokens, and the share that a perfect router asks for."""
        assert trained is not None
        assert cell.training is not None
        config, method = self.config(cell.training), trained.config
        rows = read_pairs(str(self.single_questions(cell.task) / "test.jsonl"))
        examples, _ = make_encoder(self.backbone, config.data).encode_all(rows)
        scorer = Scorer(self.backbone, recipe_for(method), examples, config.train.batch_size, config.tap_cache)
        outcomes = scorer.outcomes(trained.params)
        metrics = scorer.metrics(outcomes, method.threshold, "plugin")
        if method.routed:
            name, within = f"at {BUDGET}", scorer.at_budget(trained.params, outcomes, BUDGET)
            metrics[f"loss/{name}"] = scorer.metrics(*within, name)[f"loss/{name}"]
            metrics["oracle/usage"] = float(np.mean(outcomes.consulted < outcomes.unconsulted))
        return metrics

    def _learning_rate(self, training: Training) -> float:
        """Returns the learning rate whose run of `tuned_on` has the least held-out loss, or the config's own."""
        on = training.tuned_on
        if on is None:
            return self.config(training).optimizer.learning_rate
        path = self._path("rates", on.label)
        if not path.exists():
            losses = {}
            for label, rate in trials(on).items():
                if not self._path("trainings", label).exists():
                    self._train_at(on, rate, label)
                losses[f"{rate:g}"] = _read(self._path("trainings", label))[f"loss/{on.changes['setting']}"]
            write_json(path, {"chosen_on": on.label, "held_out_loss": losses})
        losses = _read(path)["held_out_loss"]
        return float(min(losses, key=lambda rate: losses[rate]))

    def _train_at(self, training: Training, rate: float, label: str) -> Path:
        name = f"{training.label}-{rate:g}"
        run, kept = self._workdir / "trainings" / name, self._path("trainings", label)
        if kept.exists() and (run / "plugin").is_dir():  # several cells are of one training
            return run
        log.info("training %s at %g", training.label, rate)
        config = self.config(training, rate)
        record = {
            "training": label,
            "run": name,
            "description": training.description,
            "learning_rate": rate,
            "epochs": config.train.epochs,
            "hardware": hardware(),
        }
        write_json(kept, {**record, **train(config, run)})
        return run

    def directory(self, task: str, more: bool = False) -> str:
        """Returns the directory of the task's splits as JSON lines; empty for the hub.

        Args:
            task: name of the task.
            more: whether to add what is there of `experiments.paper.more_rows`.
        """
        if not self._data:
            return ""
        path, whole = Path(self._data) / {CLOSED_BOOK: "sciq"}.get(task, task), self._workdir / "more_rows" / task
        if not more:
            return str(path)
        if not (whole / "test.jsonl").exists():
            more_rows.write_splits(task, path, whole)
        return str(whole)

    def single_questions(self, task: str) -> Path:
        """Returns the directory of the task's rows as single questions, after writing them where they are not there."""
        path = self._workdir / "single_questions" / task
        if not (path / "test.jsonl").exists():
            single_questions.write_splits(task, self.directory(task), path)
        return path

    def _path(self, folder: str, label: str, suffix: str = ".json") -> Path:
        return self.results / folder / f"{label}{suffix}"


def consulted_share(predictions: Sequence[Prediction]) -> list[float]:
    """Returns the per cent of generated tokens for which the device was asked, as `[mean, low, high]`, by rows."""
    asked = [100.0 * (source == "d") for row in predictions for source in row.sources]
    return list(estimate(asked, [row.group for row in predictions for _ in row.sources]))


def trials(training: Training) -> dict[str, float]:
    """Returns the labels of the training's runs at each learning rate, with these."""
    return {f"{training.label}-{rate:g}": rate for rate in LEARNING_RATES}


def _read(path: Path, description: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a record, and checks that it is of what is described.

    A record that was written before there were descriptions is known by its label.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}): delete it, and it will be made again") from error
    if description is not None:
        before = record.get("description", description)
        changed = [name for name, value in description.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"'{path}' is of another {', '.join(changed)} than asked for: delete it, and it will be made again"
            )
    return record
