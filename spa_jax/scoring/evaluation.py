"""Evaluation of a plugin, or of a backbone alone, on a task: losses over its whole split, and scores of generations.

Two shares are told apart. `router/usage` is the *teacher-forced* share of target tokens for which the device is asked;
`consulted_share` is the share of *generated* tokens, EOS included. The latter is the paper's usage and, as each of
these tokens takes one exchange, its ratio M of exchanges to tokens.
"""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spa_jax.data.detokenizing import token_texts
from spa_jax.data.encoding import Encoder, Example
from spa_jax.data.pairs import Pair
from spa_jax.data.row_formats import read_pairs
from spa_jax.data.tasks import Split, find_task, load_split, nested_subset
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.encoders import task_encoder
from spa_jax.decoding.fused import FusedModel
from spa_jax.decoding.hypotheses import Generation
from spa_jax.decoding.prompt_store import PromptStore
from spa_jax.errors import UserError
from spa_jax.files import write_json
from spa_jax.models.combine import ROUTED, Setting
from spa_jax.scoring.bootstrap import estimate
from spa_jax.scoring.effect import side_effect
from spa_jax.scoring.predictions import Prediction, Predictions, hash_of
from spa_jax.scoring.report import Answered, write_report
from spa_jax.scoring.rouge import TOKENIZERS, is_scoreable
from spa_jax.scoring.scores import Kind, repetition, score
from spa_jax.training.methods import recipe_for
from spa_jax.training.outcomes import threshold_for, token_metrics
from spa_jax.training.progress import progress_bar
from spa_jax.training.scorer import Scorer
from spa_jax.training.sources import run_backbone
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Trained, digest_of

log = logging.getLogger(__name__)

PREDICTIONS, SUMMARY, REPORT = "predictions.jsonl", "evaluation.json", "report.html"
OWN_TOKENS = 128
"""Most tokens to generate for a question of own rows."""
FEW_ROWS = 30
"""Number of rows below which an interval says little: a bootstrap of few rows is too narrow."""
EFFECT_QUESTIONS = 128
"""Number of questions, from the first on, for which the effect of the side network is measured."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """A task or a file of own rows, and how a model is evaluated on it.

    Attributes:
        task: name of the task; empty for own rows.
        data: directory with the task's splits as JSON lines, empty for the hub; or the file of own rows, in any format
            of `spa_jax.data.row_formats`.
        split: split of the task.
        limit: most questions to generate for, in whole rows; 0 for all. Losses are of the whole split.
        setting: what goes on from the entry; None for the plugin's own setting.
        threshold: the device is asked where p(consult) is above it; None for the plugin's own threshold.
        budget: instead, the largest share of the validation split's target tokens to ask for; 0 for none.
        beams: width of the beam search; 1 is greedy.
        length_penalty: length penalty of the beam search.
        shots: training rows to show before each question, 0 or 1.
        max_length: most tokens of a row, 0 for the task's.
        batch_size: prompts that are worked on at once.
        effect: also measure what the side network changes, see `spa_jax.scoring.effect` (Table 4).
        rouge_tokenizer: what ROUGE counts, see `spa_jax.scoring.rouge`.
        columns: our names of the columns of own rows and theirs, such as `source=question,target=answer`.
        new_tokens: most tokens to generate, 0 for the task's, or `OWN_TOKENS`.
    """

    task: str
    data: str
    split: Split = "test"
    limit: int = 0
    setting: Setting | None = None
    threshold: float | None = None
    budget: float = 0.0
    beams: int = 4
    length_penalty: float = 1.0
    shots: int = 0
    max_length: int = 0
    batch_size: int = 16
    effect: bool = False
    rouge_tokenizer: str = "english"
    columns: str = ""
    new_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.task and not self.data:
            raise UserError("name a task, or a file of your own rows")
        if not self.task and (self.budget or self.shots):
            raise UserError("budget and shots take rows of a task's other splits, which own rows do not have")
        if self.task and self.columns:
            raise UserError(f"columns are of own rows, and the task '{self.task}' has its own")
        if not 0 <= self.budget <= 1 or (self.budget and self.threshold is not None):
            raise UserError(f"budget is {self.budget}, but must lie between 0 and 1, and takes the place of threshold")
        if self.shots not in (0, 1) or min(self.limit, self.max_length, self.new_tokens) < 0:
            raise UserError(
                f"shots ({self.shots}) is 0 or 1, limit ({self.limit}), max_length ({self.max_length}) and new_tokens "
                f"({self.new_tokens}) are at least 0"
            )
        if min(self.beams, self.batch_size) < 1:
            raise UserError(f"beams ({self.beams}) and batch_size ({self.batch_size}) are at least 1")
        if self.rouge_tokenizer not in TOKENIZERS:
            raise UserError(f"rouge_tokenizer is '{self.rouge_tokenizer}'; choices are {', '.join(TOKENIZERS)}")

    @property
    def most_tokens(self) -> int:
        """The most tokens to generate."""
        return self.new_tokens or (find_task(self.task).new_tokens if self.task else OWN_TOKENS)

    @property
    def scores(self) -> Kind:
        """How answers are scored; those of own rows as short ones, since all scores are shown."""
        return find_task(self.task).scores if self.task else "answers"

    def read(self, split: Split) -> list[Pair]:
        """Reads the rows of a split, or the own ones.

        Raises:
            UserError: they cannot be read.
        """
        return load_split(self.task, self.data, split) if self.task else read_pairs(self.data, self.columns)


class Question(NamedTuple):
    """A prompt to answer, as token ids, with the answers that it is scored against and its own last source."""

    id: str
    prompt: list[int]
    references: tuple[str, ...]
    source: str = ""


def evaluate(
    config: EvaluationConfig,
    backbone: Backbone,
    plugin: Trained | None,
    output: Path,
    prompts: PromptStore | None = None,
    html: bool = False,
) -> dict[str, Any]:
    """Runs or resumes an evaluation, and returns what `evaluation.json` says.

    Args:
        config: the task, and how to evaluate on it.
        backbone: the frozen model.
        plugin: what was trained on it; None for the backbone alone.
        output: directory of predictions and summary.
        prompts: keeps prompts that have run, for other evaluations of the same questions.
        html: whether to write `report.html` too, which shows every answer by the source of its tokens.

    Raises:
        UserError: bad config, data, plugin or place for the output, or one that holds another evaluation.
    """
    template, date = (plugin.template, plugin.date) if plugin else ("", "")
    encoder = task_encoder(backbone, template, config.task, config.max_length, date, limited_by="max_length")
    threshold = config.threshold
    if config.budget:
        held_out, _ = encoder.encode_all(config.read("validation"))
        threshold = _threshold(backbone, plugin, held_out, config)
    model = FusedModel(backbone, plugin, config.setting, threshold, prompts)
    pairs = config.read(config.split)
    examples, cut = encoder.encode_all(pairs)
    if config.shots:
        shown = _demonstration(encoder, config)
        examples = [encoder.encode_with_demonstration(shown, pair) for pair in pairs]
        _check_context(examples, backbone.config.max_position_embeddings - config.most_tokens, encoder)
    questions = _questions(pairs, examples, config)
    warnings = list(_warnings(questions, config.rouge_tokenizer))
    for warning in warnings:
        log.warning("%s", warning)
    identity = _identity(config, encoder, model, plugin, questions)
    predictions = Predictions(output / PREDICTIONS, identity)
    summary: dict[str, Any] = {"data/questions": len(questions), "data/sources_cut": cut}
    summary |= _losses(backbone, plugin, model, examples, config.batch_size)
    beams = Beams(config.beams, config.length_penalty) if config.beams > 1 else None
    todo = [question for question in questions if question.id not in predictions.rows]
    for answered in generate_all(model, todo, config.most_tokens, beams, config.batch_size):
        predictions.add([_prediction(config, encoder, *one) for one in answered])
    summary |= summarize(list(predictions.rows.values()))
    if config.effect:
        some = questions[:EFFECT_QUESTIONS]
        greedy = itertools.chain.from_iterable(generate_all(model, some, config.most_tokens, None, config.batch_size))
        summary |= side_effect(model, [(q.prompt, g.tokens) for q, g in greedy], config.batch_size)
    write_json(output / SUMMARY, {"evaluation": identity, **summary})
    if html:
        rows = [(question, predictions.rows[question.id]) for question in questions]
        answers = [Answered(q.source, q.references, row, len(row.sources) == config.most_tokens) for q, row in rows]
        name = config.task or Path(config.data).name
        facts = {"backbone": backbone.name, "plugin": _describe_plugin(plugin), "setting": model.setting}
        write_report(output / REPORT, f"{name}, {model.setting}", facts, summary, answers, warnings)
    return summary


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Averages scores and repetition, as `[mean, low, high]` with a 95 % bootstrap interval over rows, and counts the
    share of generated tokens for which the device was asked. Of a single row there is no interval: its ends are
    infinite, and null in a file."""
    groups = [row.group for row in predictions]
    scores = {
        f"score/{name}": list(estimate([row.scores[name] for row in predictions], groups))
        for name in predictions[0].scores
    }
    scores["repetition"] = list(estimate([repetition(row.text) for row in predictions], groups))
    sources = "".join(row.sources for row in predictions)
    return {**scores, "consulted_share": sources.count("d") / len(sources), "generated_tokens": len(sources)}


def generate_all(
    model: FusedModel, questions: Sequence[Question], new_tokens: int, beams: Beams | None, batch_size: int
) -> Iterator[list[tuple[Question, Generation]]]:
    """Yields generations, a batch at a time: prompts of about one length together, each conversation by itself."""
    rows: dict[str, list[Question]] = {}
    for question in questions:
        rows.setdefault(question.id.partition(".")[0], []).append(question)
    ordered = sorted(rows.values(), key=lambda row: len(row[-1].prompt))
    conversations = [row for row in ordered if len(row) > 1]
    single = [question for row in ordered if len(row) == 1 for question in row]
    batches = [part[i : i + batch_size] for part in (single, *conversations) for i in range(0, len(part), batch_size)]
    with progress_bar() as bar:
        for batch in bar.track(batches, description="generating"):
            prompts = [question.prompt for question in batch]
            yield list(zip(batch, model.generate(prompts, new_tokens, beams=beams, batch_size=batch_size)))


def _prediction(config: EvaluationConfig, encoder: Encoder, question: Question, generation: Generation) -> Prediction:
    text = encoder.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
    sources = "".join("d" if asked else "c" for asked in generation.consulted)
    found = score(config.scores, text, question.references, config.rouge_tokenizer)
    scores = {name: round(value, 4) for name, value in found.items()}
    pieces = token_texts(encoder.tokenizer, generation.tokens)
    return Prediction(question.id, hash_of(question.prompt, question.references), text, sources, scores, pieces)


def _questions(pairs: Sequence[Pair], examples: Sequence[Example], config: EvaluationConfig) -> list[Question]:
    questions: list[Question] = []
    for number, (pair, example) in enumerate(zip(pairs, examples), start=1):
        if config.limit and len(questions) >= config.limit:
            break
        turns = pair.learnt_turns
        for turn, (asked, prompt) in enumerate(zip(turns, example.prompts[-len(turns) :]), start=1):
            name = str(number) if len(turns) == 1 else f"{number}.{turn}"
            questions.append(Question(name, prompt, (asked.target, *asked.references), asked.source))
    return questions


def _warnings(questions: Sequence[Question], tokenizer: str) -> Iterator[str]:
    """Yields what a reader of the scores has to know of these questions."""
    count = sum(not any(is_scoreable(text, tokenizer) for text in question.references) for question in questions)
    if count:
        advice = "" if tokenizer == "unicode" else " (rouge_tokenizer=unicode counts the words of every script)"
        unscoreable = f"{count} of {len(questions)} questions have no reference with a token that ROUGE counts"
        yield f"{unscoreable}, and 0 for a score{advice}"
    if (rows := len({question.id.partition(".")[0] for question in questions})) < FEW_ROWS:
        yield f"{rows} rows say little, and their intervals are too narrow: have at least {FEW_ROWS}"


def _demonstration(encoder: Encoder, config: EvaluationConfig) -> Pair:
    """Returns the first row of the training data's shuffle that is not cut.

    Raises:
        UserError: all of them are.
    """
    train = config.read("train")
    for pair in nested_subset(train, "full"):
        if not encoder.encode(pair)[1]:
            return pair
    raise UserError(
        f"every training row of {config.task} is longer than {encoder.max_length} tokens: none can be shown"
    )


def _check_context(examples: Sequence[Example], most: int, encoder: Encoder) -> None:
    longest = max(len(example.prompts[-1]) for example in examples)
    if longest > most:
        raise UserError(
            f"with a training row before it, a prompt has {longest} tokens, and the backbone's context has room for "
            f"{most}: set max_length below {encoder.max_length}, or leave out shots"
        )


def _losses(
    backbone: Backbone, plugin: Trained | None, model: FusedModel, examples: Sequence[Example], batch_size: int
) -> dict[str, Any]:
    """Measures `loss/...` in nats and `router/usage`, per target token, and `nats`: the loss in the setting that is
    evaluated, with an interval over rows."""
    if plugin is None:
        features = [one for _, one in run_backbone(backbone.model(), backbone.params, batch_size, examples)]
        rows = [np.asarray(one.base_loss)[np.asarray(one.weights) > 0] for one in features]
        nats = estimate(np.concatenate(rows), np.repeat(range(len(rows)), [len(row) for row in rows]))
        return {"loss/base": nats.mean, "nats": list(nats)}
    scorer = Scorer(backbone, recipe_for(plugin.config), examples, batch_size)
    setting = plugin.config.setting if model.setting == "base" else model.setting
    threshold = model.threshold if setting in ROUTED else -1.0  # below every p(consult)
    outcomes = scorer.outcomes(plugin.params, threshold)
    losses = token_metrics(outcomes, threshold)["base" if model.setting == "base" else "combined"]
    nats = estimate(np.asarray(losses), scorer.examples_of_tokens())
    return {**scorer.metrics(outcomes, threshold, setting), "nats": list(nats)}


def _threshold(
    backbone: Backbone, plugin: Trained | None, held_out: Sequence[Example], config: EvaluationConfig
) -> float:
    if plugin is None or not plugin.config.routed:
        raise UserError("a budget sets a router's threshold, and there is no router: leave it out")
    scorer = Scorer(backbone, recipe_for(plugin.config), held_out, config.batch_size)
    return threshold_for(scorer.outcomes(plugin.params).probability, config.budget)


def _describe_plugin(plugin: Trained | None) -> str:
    """Says what a plugin is, with the digest that evaluation.json has."""
    if plugin is None:
        return "none"
    return f"{digest_of(plugin.params)}, entry {plugin.config.entry}, edits {plugin.config.edits}"


def _identity(
    config: EvaluationConfig,
    encoder: Encoder,
    model: FusedModel,
    plugin: Trained | None,
    questions: Sequence[Question],
) -> dict[str, Any]:
    """Describes all that the predictions depend on, and no place of this machine."""
    asked = [hash_of(question.prompt, question.references) for question in questions]
    kept = ("task", "split", "beams", "length_penalty", "shots")
    method = plugin.config if plugin is not None else None
    where = {} if method is None or method.entry == "head" else {"entry": method.entry, "edits": method.edits}
    counted: dict[str, Any] = {}
    if config.rouge_tokenizer != "english":
        counted["rouge_tokenizer"] = config.rouge_tokenizer
    if config.new_tokens:
        counted["new_tokens"] = config.new_tokens
    return {
        **where,
        **counted,
        **({"date": encoder.date} if encoder.writes_date else {}),
        **{name: getattr(config, name) for name in kept},
        "setting": model.setting,
        "threshold": model.threshold,
        "backbone": model.backbone.identity,
        "plugin": None if plugin is None else digest_of(plugin.params),
        "questions": hashlib.sha256("".join(asked).encode()).hexdigest()[:16],
    }
