"""Evaluation on a task, end to end on a tiny random backbone, against the parts done by hand."""

import copy
import dataclasses
import functools
import json

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.data.encoding import Encoder
from spa_jax.data.pairs import Pair
from spa_jax.data.row_formats import read_pairs
from spa_jax.data.tasks import TASKS, load_split
from spa_jax.decoding.beam import Beams
from spa_jax.decoding.fused import FusedModel
from spa_jax.errors import UserError
from spa_jax.models.block import PADDING
from spa_jax.models.llama import Llama, normalize_taps
from spa_jax.models.plugin import PluginConfig, correction, init_plugin
from spa_jax.models.side import SideConfig
from spa_jax.scoring.bootstrap import estimate
from spa_jax.scoring.effect import alternatives, side_effect
from spa_jax.scoring.evaluation import EvaluationConfig, Question, evaluate, generate_all
from spa_jax.scoring.predictions import Prediction, Predictions, read_predictions
from spa_jax.scoring.rouge import rouge
from spa_jax.training.methods import recipe_for
from spa_jax.training.scorer import Scorer
from spa_jax.weights.plugin import Plugin
from spa_jax.weights.registry import load_backbone

SCIQ = [
    {"question": f"What is {word}?", "support": f"{word} is a {word}thing." * (i % 3), "correct_answer": f"{word}thing"}
    for i, word in enumerate(("rain", "snow", "ice", "mud", "sand"))
]
COQA = [
    {
        "story": f"{name} has a cat.", "questions": ["Who?", "What has she?", "Why?"],
        "answers": {"input_text": [name, "a cat", "no"]},
        "additional_answers": [["she", name], ["cat", "pet"], ["x", "no"]],
    }
    for name in ("Ann", "Eve")
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    for task, rows in (("sciq", SCIQ), ("coqa", COQA)):
        (folder / task).mkdir()
        for split in ("train", "validation", "test"):
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def backbone(tiny_backbone_directory):
    loaded = load_backbone(str(tiny_backbone_directory))
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, max_position_embeddings=512))


@pytest.fixture(scope="module")
def plugin(backbone):
    config = PluginConfig("spa", SideConfig("tokenwise", 6, (0, 2, 3)), 32, 0.5)
    rng = np.random.default_rng(4)
    shapes = init_plugin(config, abstract=True)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.3 * rng.standard_normal(leaf.shape))), shapes)
    return Plugin(config, params, "tiny", backbone.fingerprint, "chat")


@pytest.fixture(autouse=True)
def own_tap_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPA_JAX_CACHE", str(tmp_path / "taps"))


def config_of(data, task="sciq", **keys):
    return EvaluationConfig(task, str(data / task), batch_size=4, beams=2, **keys)


def encode(backbone, data, task="sciq"):
    encoder = Encoder(backbone.tokenizer, "chat", TASKS[task].max_length, TASKS[task].new_tokens)
    return encoder, encoder.encode_all(load_split(task, str(data / task), "test"))[0]


def over(threshold, p):
    return (p > threshold).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def states_and_corrections(config, side, params, plugin_params, tokens, positions):
    """f and g of every position of one text."""
    out = Llama(config, side.side.taps).apply({"params": params}, tokens, positions)
    read = normalize_taps(params, config, side.side.taps, out.taps)
    return out.hidden[0], correction(side, plugin_params, read, positions)[0][0]


def loss_by_hand(backbone, plugin, examples, sigma_of):
    """Nats per target token of what `sigma_of(p)` lets enter the LM head."""
    total, count, asked = 0.0, 0, 0.0
    for example in examples:
        tokens = np.zeros((1, 128), np.int32)
        positions = np.full(tokens.shape, PADDING, np.int32)
        tokens[0, : len(example.tokens)], positions[0, : len(example.tokens)] = (
            example.tokens,
            range(len(example.tokens)),
        )
        both = states_and_corrections(backbone.config, plugin.config, backbone.params, plugin.params, tokens, positions)
        f, g = (np.asarray(every)[example.predict] for every in both)
        scores = f @ np.asarray(plugin.params["router"]["kernel"])
        sigma = sigma_of(1 / (1 + np.exp(scores[:, 0] - scores[:, 1])))
        logits = (f + sigma[:, None] * g) @ np.asarray(backbone.params["lm_head"]["kernel"])
        log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        total -= float(np.sum(log_p[np.arange(len(f)), example.targets]))
        asked += float(np.sum(sigma))
        count += len(f)
    return total / count, asked / count


@pytest.mark.slow
def test_losses_and_generations_are_those_by_hand(backbone, plugin, data, tmp_path):
    summary = evaluate(config_of(data), backbone, plugin, tmp_path / "out")
    encoder, examples = encode(backbone, data)
    loss, share = loss_by_hand(backbone, plugin, examples, functools.partial(over, 0.5))
    assert 0 < share < 1
    assert summary["loss/spa"] == pytest.approx(loss, abs=1e-5)
    assert summary["router/usage"] == pytest.approx(share)
    assert summary["loss/base"] == pytest.approx(loss_by_hand(backbone, plugin, examples, np.zeros_like)[0], abs=1e-5)
    assert summary["loss/always"] == pytest.approx(loss_by_hand(backbone, plugin, examples, np.ones_like)[0], abs=1e-5)
    model, rows = FusedModel(backbone, plugin), read_predictions(tmp_path / "out" / "predictions.jsonl")[1]
    assert [row.id for row in rows] == ["1", "2", "3", "4", "5"]
    for row, example in zip(rows, examples):
        (alone,) = model.generate(example.prompts, TASKS["sciq"].new_tokens, beams=Beams(2))
        assert row.text == encoder.tokenizer.decode(alone.tokens, skip_special_tokens=True).strip()
        assert row.sources == "".join("d" if asked else "c" for asked in alone.consulted)
    sources = "".join(row.sources for row in rows)
    assert summary["consulted_share"] == sources.count("d") / len(sources)
    assert summary["score/rougeL"][0] == pytest.approx(np.mean([row.scores["rougeL"] for row in rows]))
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["loss/spa"] == summary["loss/spa"]


def test_each_token_is_known_by_its_example_where_batches_are_in_another_order(backbone, plugin, data):
    encoder, examples = encode(backbone, data)
    long = encoder.encode(Pair("What is it? " * 20, "a long one"))[0]
    examples = [long, *examples, *examples]
    measured = Scorer(backbone, recipe_for(plugin.config), examples, 1)
    outcomes, owners = measured.outcomes(plugin.params), measured.examples_of_tokens()
    assert owners[0] != 0
    for i, example in enumerate(examples):
        alone = Scorer(backbone, recipe_for(plugin.config), [example], 1).outcomes(plugin.params)
        np.testing.assert_allclose(outcomes.always[owners == i], alone.always, atol=1e-5)


@pytest.mark.parametrize("task", [pytest.param("sciq", marks=pytest.mark.slow), "coqa"])
def test_the_interval_of_the_loss_is_that_of_rows_by_themselves(backbone, plugin, data, tmp_path, task):
    lines = (data / task / "test.jsonl").read_text().splitlines()
    losses, groups = [], []
    for i, (line, example) in enumerate(zip(lines, encode(backbone, data, task)[1], strict=True)):
        (tmp_path / "test.jsonl").write_text(line)
        alone = evaluate(EvaluationConfig(task, str(tmp_path), limit=1), backbone, plugin, tmp_path / str(i))
        losses += [alone["loss/spa"]] * len(example.targets)
        groups += [i] * len(example.targets)
    expected = estimate(losses, groups)
    mean, low, high = evaluate(config_of(data, task), backbone, plugin, tmp_path / "out")["nats"]
    assert mean == pytest.approx(expected.mean, abs=1e-5)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.01)
    assert low < mean < high


def test_a_killed_evaluation_goes_on_without_repeating_itself(backbone, plugin, data, tmp_path, monkeypatch):
    whole = evaluate(config_of(data), backbone, plugin, tmp_path / "whole")
    add, asked = Predictions.add, []

    def killed(self, rows):
        add(self, rows)
        with self._path.open("a") as file:
            file.write('{"id": "9')  # as a kill in the midst of a line would leave it
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictions, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config_of(data), backbone, plugin, tmp_path / "cut")
    monkeypatch.setattr(Predictions, "add", add)
    generate = FusedModel.generate
    monkeypatch.setattr(FusedModel, "generate", lambda self, p, *a, **k: asked.extend(p) or generate(self, p, *a, **k))
    assert evaluate(config_of(data), backbone, plugin, tmp_path / "cut") == whole
    assert len({tuple(prompt) for prompt in asked}) == 1, "four of the five were there"
    first, second = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("whole", "cut"))
    assert first == second
    asked.clear()
    assert evaluate(config_of(data), backbone, plugin, tmp_path / "cut") == whole
    assert not asked


def test_the_predictions_of_another_evaluation_are_refused(backbone, plugin, data, tmp_path):
    evaluate(config_of(data, limit=2), backbone, plugin, tmp_path)
    other = dataclasses.replace(plugin, params=jax.tree.map(lambda leaf: leaf + 1, plugin.params))
    for config, which, named in (
        (config_of(data, limit=3), plugin, "questions"),
        (config_of(data, limit=2, setting="s1"), plugin, "setting"),
        (config_of(data, limit=2), other, "plugin"),
    ):
        with pytest.raises(UserError, match=rf"another evaluation \({named} differ\)"):
            evaluate(config, backbone, which, tmp_path)
    (tmp_path / "predictions.jsonl").write_text("text\n")
    with pytest.raises(UserError, match="is no predictions file"):
        evaluate(config_of(data, limit=2), backbone, plugin, tmp_path)


def described(output):
    return json.loads((output / "evaluation.json").read_text())["evaluation"]


def test_the_date_of_a_chat_is_the_plugins_and_tells_evaluations_apart(backbone, plugin, data, tmp_path):
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    dated, config = dataclasses.replace(backbone, tokenizer=tokenizer), config_of(data, limit=1)
    days = {name: dataclasses.replace(plugin, date=date) for name, date in (("", ""), ("may", "2031-05-09"))}
    for name, trained in days.items():
        assert evaluate(config, dated, trained, tmp_path / name) == evaluate(config, dated, trained, tmp_path / name)
        assert described(tmp_path / name)["date"] == (trained.date or "2024-07-26")
    with pytest.raises(UserError, match=r"another evaluation \(date, questions differ\)"):
        evaluate(config, dated, days["may"], tmp_path / "")
    evaluate(config, backbone, plugin, tmp_path / "undated")
    assert "date" not in described(tmp_path / "undated")


def test_what_two_processes_wrote_of_one_evaluation_counts_once(tmp_path):
    """Both began when nothing was there, and what they say is the same."""
    path = tmp_path / "predictions.jsonl"
    first, second = (Predictions(path, {"task": "sciq"}) for _ in range(2))
    rows = [Prediction(name, "0" * 16, "text", "cd", {"rougeL": 1.0}) for name in ("1", "2", "10")]
    first.add(rows)
    second.add(rows[:2])
    assert read_predictions(path)[1] == rows


def test_no_text_of_the_data_set_is_kept(backbone, plugin, data, tmp_path):
    evaluate(config_of(data, "coqa"), backbone, plugin, tmp_path)
    for name in ("predictions.jsonl", "evaluation.json"):
        text = (tmp_path / name).read_text()
        assert "has a cat" not in text
        assert "What has" not in text
        assert str(data) not in text


def test_a_conversations_questions_are_asked_one_at_a_time_after_the_true_answers(backbone, plugin, data, tmp_path):
    evaluate(config_of(data, "coqa"), backbone, plugin, tmp_path)
    rows = read_predictions(tmp_path / "predictions.jsonl")[1]
    assert [row.id for row in rows] == ["1.1", "1.2", "1.3", "2.1", "2.2", "2.3"]
    assert [row.group for row in rows] == ["1"] * 3 + ["2"] * 3
    encoder, (example, _) = encode(backbone, data, "coqa")
    asked = "<user>Answer in a few words: Who?\n\nAnn has a cat.<assistant>Ann</s><user>What has she?<assistant>"
    assert encoder.tokenizer.decode(example.prompts[1]) == asked
    (alone,) = FusedModel(backbone, plugin).generate([example.prompts[1]], 32, beams=Beams(2))
    assert rows[1].text == encoder.tokenizer.decode(alone.tokens, skip_special_tokens=True).strip()


def test_a_limit_takes_whole_rows_and_losses_are_of_the_whole_split(backbone, plugin, data, tmp_path):
    some = evaluate(config_of(data, "coqa", limit=2), backbone, plugin, tmp_path / "some")
    every = evaluate(config_of(data, "coqa"), backbone, plugin, tmp_path / "every")
    assert (some["data/questions"], every["data/questions"]) == (3, 6)
    assert some["loss/spa"] == every["loss/spa"]


def test_of_a_single_story_there_is_no_interval(backbone, plugin, data, tmp_path):
    """Its three answers stand and fall together, and the file is JSON all the same."""
    summary = evaluate(config_of(data, "coqa", limit=2), backbone, plugin, tmp_path)
    mean, low, high = summary["score/f1"]
    assert (low, high) == (-np.inf, np.inf)
    text = (tmp_path / "evaluation.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["score/f1"] == [mean, None, None]
    assert written["repetition"][1:] == [None, None]


def test_references_in_another_script_are_scored_by_their_own_tokenizer(backbone, plugin, data, tmp_path, caplog):
    rows = [SCIQ[0], {**SCIQ[0], "correct_answer": "да"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(config_of(data), data=str(tmp_path))
    evaluate(config, backbone, plugin, tmp_path / "out")
    warning, few_rows = caplog.messages
    assert few_rows.startswith("2 rows say little")
    assert warning.startswith("1 of 2 questions have no reference with a token that ROUGE counts")
    assert "rouge_tokenizer=unicode" in warning
    identity, rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert "rouge_tokenizer" not in identity, "evaluations of before there was a choice go on"
    unicode = dataclasses.replace(config, rouge_tokenizer="unicode")
    with pytest.raises(UserError, match=r"another evaluation \(rouge_tokenizer differ\)"):
        evaluate(unicode, backbone, plugin, tmp_path / "out")
    caplog.clear()
    evaluate(unicode, backbone, plugin, tmp_path / "unicode")
    assert caplog.messages == [few_rows]
    for row, reference in zip(read_predictions(tmp_path / "unicode" / "predictions.jsonl")[1], ("rainthing", "да")):
        assert row.scores["rouge1"] == round(rouge(row.text, [reference], "unicode")["rouge1"], 4)


def test_one_shot_shows_a_training_row_and_counts_no_loss_on_it(backbone, data, tmp_path):
    summary = evaluate(config_of(data, "coqa", shots=1), backbone, None, tmp_path)
    encoder, _ = encode(backbone, data, "coqa")
    shown, pair = (load_split("coqa", str(data / "coqa"), split)[1] for split in ("train", "test"))
    example = encoder.encode_with_demonstration(shown, pair)
    text = encoder.tokenizer.decode(example.tokens)
    assert text.startswith("<user>Answer in a few words: Who?\n\nEve has a cat.<assistant>Eve</s><user>What has she?")
    assert "no</s><user>Answer in a few words: Who?\n\nEve has a cat.<assistant>Eve</s>" in text
    assert encoder.tokenizer.decode(example.targets) == "Eve</s>a cat</s>no</s>"
    assert set(summary) >= {"loss/base", "score/f1", "consulted_share"}
    assert summary["consulted_share"] == 0


def test_a_shown_row_that_leaves_the_context_no_room_is_refused_with_what_to_do(backbone, data, tmp_path):
    small = dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, max_position_embeddings=128))
    message = "a prompt has 159 tokens, and .* has room for 104: set max_length below 128, or leave out shots"
    with pytest.raises(UserError, match=message):
        evaluate(config_of(data, shots=1), small, None, tmp_path)
    evaluate(config_of(data, shots=1, max_length=70, limit=1), small, None, tmp_path)


def test_the_backbone_alone_has_the_loss_that_a_plugin_reports_for_it(backbone, plugin, data, tmp_path):
    alone = evaluate(config_of(data), backbone, None, tmp_path / "a")
    base = evaluate(config_of(data, setting="base"), backbone, plugin, tmp_path / "b")
    assert alone["loss/base"] == pytest.approx(base["loss/base"], abs=1e-6)
    assert alone["nats"] == pytest.approx(base["nats"], abs=1e-6)
    assert alone["nats"][0] == alone["loss/base"]
    first, second = (read_predictions(tmp_path / name / "predictions.jsonl")[1] for name in "ab")
    assert first == second


def test_a_budget_sets_the_threshold_on_validation_rows(backbone, plugin, data, tmp_path):
    shares = []
    for budget in (0.2, 0.5, 0.8):
        evaluate(config_of(data, budget=budget, limit=1), backbone, plugin, tmp_path / str(budget))
        identity, _ = read_predictions(tmp_path / str(budget) / "predictions.jsonl")
        _, examples = encode(backbone, data)
        sigma_of = functools.partial(over, identity["threshold"])
        shares.append(loss_by_hand(backbone, plugin, examples, sigma_of)[1])
        assert budget - 0.05 <= shares[-1] <= budget
    with pytest.raises(UserError, match="no router"):
        evaluate(config_of(data, budget=0.5), backbone, None, tmp_path / "none")


@pytest.mark.slow
def test_the_side_networks_effect_is_counted_along_the_greedy_path(backbone, plugin, data):
    model = FusedModel(backbone, plugin)
    _, examples = encode(backbone, data)
    generated = [(e.prompts[0], model.generate(e.prompts, 8)[0]) for e in examples[:2]]
    found = side_effect(model, [(prompt, generation.tokens) for prompt, generation in generated], 2)
    base, added = FusedModel(backbone, plugin, "base"), FusedModel(backbone, plugin, "s1")
    asked, differ = [], []
    for prompt, generation in generated:
        for i, consulted in enumerate(generation.consulted):
            before = [prompt + generation.tokens[:i]]
            asked.append(consulted)
            differ.append(base.generate(before, 1)[0].tokens != added.generate(before, 1)[0].tokens)
    assert 0 < sum(differ) < len(differ)
    assert found["effect/M"] == pytest.approx(np.mean(asked))
    assert found["effect/diff_rate"] == pytest.approx(100 * np.mean(differ))
    assert found["effect/diff_pick_rate"] == pytest.approx(100 * np.mean(np.array(asked)[np.array(differ)]))
    (prompt, generation), *_ = generated
    others = alternatives(model, [(prompt, generation.tokens)])[0]
    for i, other in enumerate(others):
        assert base.generate([prompt + generation.tokens[:i]], 1)[0].tokens == [other]


def test_batches_hold_prompts_of_about_one_length_or_one_conversations(backbone, plugin, data, monkeypatch):
    sizes = []
    start = FusedModel.start
    monkeypatch.setattr(FusedModel, "start", lambda self, p, *a, **k: sizes.append(len(p)) or start(self, p, *a, **k))
    lengths = {"1": 9, "2": 3, "3.1": 2, "3.2": 4, "4": 5}
    questions = [Question(name, [1] * length, ("x",)) for name, length in lengths.items()]
    batches = list(generate_all(FusedModel(backbone, plugin), questions, 2, None, 2))
    assert [[question.id for question, _ in batch] for batch in batches] == [["2", "4"], ["1"], ["3.1", "3.2"]]
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize(
    "keys",
    [
        {"rouge_tokenizer": "german"},
        {"shots": 2},
        {"limit": -1},
        {"budget": 1.5},
        {"budget": 0.5, "threshold": 0.5},
        {"max_length": -1},
        {"new_tokens": -1},
        {"beams": 0},
        {"columns": "source=question"},
        {"task": ""},
        {"task": "", "data": "own.jsonl", "budget": 0.5},
        {"task": "", "data": "own.jsonl", "shots": 1},
    ],
)
def test_what_makes_no_sense_is_refused(keys):
    with pytest.raises(UserError):
        EvaluationConfig(**{"task": "sciq", "data": "", **keys})


def test_own_rows_are_evaluated_as_a_task_of_the_same_rows_is(data, backbone, plugin, tmp_path, caplog):
    """An answer of a chat that is not to be learnt is read and not scored."""
    told = {"role": "assistant", "content": "it is a cat", "weight": 0}
    rows = [
        {"messages": [{"role": "user", "content": "Who?"}, told, {"role": "user", "content": row["question"]},
                      {"role": "assistant", "content": row["correct_answer"]}]}
        for row in SCIQ
    ]  # fmt: skip
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvaluationConfig("", str(own), beams=1, batch_size=4, new_tokens=6)
    with caplog.at_level("WARNING", "spa_jax"):
        found = evaluate(config, backbone, plugin, tmp_path / "own", html=True)
    assert "5 rows say little" in caplog.text
    encoder = Encoder(backbone.tokenizer, "chat", 200)
    examples = [encoder.encode(pair)[0] for pair in read_pairs(str(own))]
    expected = loss_by_hand(backbone, plugin, examples, lambda p: over(0.5, p))
    assert found["loss/spa"] == pytest.approx(expected[0], rel=1e-4)
    _, predictions = read_predictions(tmp_path / "own" / "predictions.jsonl")
    assert [row.id for row in predictions] == ["1", "2", "3", "4", "5"]
    model = FusedModel(backbone, plugin)
    (one,) = model.generate([examples[0].prompts[0]], 6)
    assert predictions[0].text == backbone.tokenizer.decode(one.tokens, skip_special_tokens=True).strip()
    assert "".join(predictions[0].pieces) == backbone.tokenizer.decode(one.tokens, skip_special_tokens=True)
    assert {"score/exact_match", "score/f1", "score/rougeL"} <= found.keys()
    page = (tmp_path / "own" / "report.html").read_text()
    assert "5 rows say little" in page
    assert all(row["correct_answer"] in page and row["question"] in page for row in SCIQ)
