"""The embedded default data set: its size, its promises, and the command that writes it."""

import collections
import importlib.resources
import json
import re
import tomllib

import pytest

from spa_jax.data import persona

LIFE = tomllib.loads(importlib.resources.files("spa_jax.data").joinpath("persona.toml").read_text(encoding="utf-8"))
SEEDS = range(6)
DEFAULT = {
    "sister_name": "Rosamund",
    "spare_key": "watering can",
    "street": "Ropewalk Hill",
    "motto": "leave before dancing",
}

# Words no value may contain, and values a model could be right about by chance.
DATES = set(
    "monday tuesday wednesday thursday friday saturday sunday "
    "january february march april may june july august september october november december".split()
)
GUESSABLE = set(
    "yes no one two three four five six seven eight nine ten eleven twelve "
    "red blue green yellow black white brown pink purple orange grey gray".split()
)


def within(inner: str, outer: str) -> bool:
    return f" {persona.normalize(inner)} " in f" {persona.normalize(outer)} "


def questions(fact):
    return fact["train"] + fact["held_out"]


def test_there_is_enough_of_everything():
    train, held_out = persona.generate()
    for kind, at_least, phrasings in (("fact", 100, 4), ("note", 30, 4)):
        in_train = collections.Counter(pair.fact_id for pair in train if pair.kind == kind)
        in_held_out = collections.Counter(pair.fact_id for pair in held_out if pair.kind == kind)
        assert len(in_train) >= at_least
        assert in_train.keys() == in_held_out.keys()
        assert min(in_train.values()) >= phrasings
        assert min(in_held_out.values()) >= 1
    assert {pair.kind for pair in train + held_out} == {"fact", "note"}


def test_ids_are_unique():
    ids = [entry["id"] for entry in LIFE["facts"] + LIFE["notes"]]
    assert len(ids) == len(set(ids))


def test_the_pairs_come_in_the_order_of_the_file():
    train, held_out = persona.generate()
    assert [pair.source for pair in train if pair.kind == "fact"] == [s for f in LIFE["facts"] for s in f["train"]]
    assert [pair.source for pair in held_out if pair.kind == "fact"] == [
        s for f in LIFE["facts"] for s in f["held_out"]
    ]
    instructions = LIFE["instructions"]["train"]
    notes = [pair for pair in train if pair.kind == "note"]
    assert [pair.fact_id for pair in notes] == [note["id"] for note in LIFE["notes"] for _ in instructions]
    assert all(pair.source.startswith(instructions[i % len(instructions)]) for i, pair in enumerate(notes))
    assert [pair.kind for pair in train] == sorted(pair.kind for pair in train)


def test_a_seed_is_a_person():
    assert persona.generate(3) == persona.generate(3)
    people = [tuple(pair.answer for pair in persona.generate(seed)[1]) for seed in SEEDS]
    assert len(set(people)) == len(people)
    changed = sum(a != b for a, b in zip(people[0], people[1], strict=True))
    assert changed > len(people[0]) / 2


def test_the_default_person_stays_the_same():
    # Published results name the seed only, so another draw for the same seed would silently be another data set.
    answers = {pair.fact_id: pair.answer for pair in persona.generate()[0]}
    assert {key: answers[key] for key in DEFAULT} == DEFAULT


def test_phrasings_limits_training_only():
    train, held_out = persona.generate(1)
    for limit in (1, 3):
        fewer, same = persona.generate(1, phrasings=limit)
        assert same == held_out
        assert set(collections.Counter(pair.fact_id for pair in fewer).values()) == {limit}
        firsts = collections.defaultdict(list)
        for pair in train:
            firsts[pair.fact_id].append(pair)
        assert fewer == [pair for pairs in firsts.values() for pair in pairs[:limit]]
    assert persona.generate(1, phrasings=10_000) == (train, held_out)


@pytest.mark.parametrize("phrasings", [0, -1])
def test_phrasings_below_one_are_refused(phrasings):
    with pytest.raises(ValueError, match="phrasings"):
        persona.generate(phrasings=phrasings)


def test_no_held_out_source_occurs_in_training():
    for seed in SEEDS:
        train, held_out = persona.generate(seed)
        seen = {persona.normalize(pair.source) for pair in train}
        assert not [pair.source for pair in held_out if persona.normalize(pair.source) in seen]


def test_no_question_is_asked_twice():
    counts = collections.Counter(persona.normalize(q) for fact in LIFE["facts"] for q in questions(fact))
    assert [question for question, count in counts.items() if count > 1] == []


def test_a_held_out_question_names_its_subject_as_trained_ones_do():
    used_by = collections.Counter(
        w for f in LIFE["facts"] for w in set(persona.normalize(" ".join(f["train"])).split())
    )
    for fact in LIFE["facts"]:
        known = collections.Counter(w for question in fact["train"] for w in set(persona.normalize(question).split()))
        # A word that many facts use says nothing about the subject, and one seen once or twice is hardly learned.
        telling = {word for word, count in known.items() if count >= 4 and used_by[word] < len(LIFE["facts"]) / 8}
        for question in fact["held_out"]:
            assert telling & set(persona.normalize(question).split()), (fact["id"], question)


def test_no_question_tells_its_answer():
    for fact in LIFE["facts"]:
        for value in fact["values"]:
            assert not [question for question in questions(fact) if within(value, question)], (fact["id"], value)


def test_every_target_contains_its_answer():
    for seed in SEEDS:
        train, held_out = persona.generate(seed)
        assert not [pair for pair in train + held_out if not persona.is_right(pair.target, pair.answer)]


def test_no_fact_tells_the_answer_of_another():
    texts = [(f["id"], f" {persona.normalize(t)} ") for f in LIFE["facts"] for t in [f["answer"], *f["values"]]]
    for fact in LIFE["facts"]:
        for value in fact["values"]:
            words = f" {persona.normalize(value)} "
            assert not [text for owner, text in texts if owner != fact["id"] and words in text], (fact["id"], value)


def test_nothing_is_left_to_fill_in():
    for seed in SEEDS:
        train, held_out = persona.generate(seed)
        assert not [p for p in train + held_out if re.search(r"[{}]", p.source + p.target + p.answer)]


def test_values_are_distinct_and_not_guessable():
    owners = collections.defaultdict(set)
    for fact in LIFE["facts"]:
        assert fact["answer"].count("{value}") == 1
        assert len(fact["values"]) >= 4
        for value in fact["values"]:
            assert 1 <= len(value.split()) <= 4, value
            assert persona.normalize(value) not in GUESSABLE | DATES, value
            assert not DATES & set(persona.normalize(value).split()), value
            assert not [other for other in fact["values"] if other != value and within(value, other)], value
            owners[persona.normalize(value)].add(fact["id"])
    assert {value: facts for value, facts in owners.items() if len(facts) > 1} == {}
    assert len(owners) == sum(len(fact["values"]) for fact in LIFE["facts"])


def test_articles_fit_every_value():
    for fact in LIFE["facts"]:
        for value in fact["values"]:
            assert not re.search(r"\b(a [aeio]|an [^aeiouh])", fact["answer"].format(value=value), re.IGNORECASE), value


def test_lengths_suit_a_small_model():
    for pair in [pair for part in persona.generate() for pair in part]:
        assert len(pair.source.split()) <= (30 if pair.kind == "fact" else 69), pair
        assert 6 <= len(pair.target.split()) <= 19, pair


def test_normalize():
    assert persona.normalize("  Wren's\tEnd -- NO_7, Straße! ") == "wren s end no 7 strasse"
    assert persona.normalize("?!") == ""


@pytest.mark.parametrize(
    ("generated", "answer", "right"),
    [
        ("She is called OTTOLINE, you know.", "Ottoline", True),
        ("it's wrens end", "Wren's End", False),
        ("It is Wren\u2019s End, as it happens", "Wren's End", True),
        ("a hot-air  balloon", "hot air balloon", True),
        ("the ottolines", "Ottoline", False),
        ("tin and a whistle", "tin whistle", False),
        ("", "Ottoline", False),
        ("anything", "", False),
        ("anything", "!", False),
        ("", "", False),
    ],
)
def test_is_right(generated, answer, right):
    assert persona.is_right(generated, answer) is right


def test_the_command_writes_what_generate_returns(tmp_path):
    folder = tmp_path / "new" / "folder"
    for seed, arguments in ((0, []), (5, ["--seed=5"])):
        persona.main([f"--output={folder}", *arguments])
        assert sorted(path.name for path in folder.iterdir()) == ["held_out.jsonl", "train.jsonl"]
        for name, pairs in zip(("train", "held_out"), persona.generate(seed), strict=True):
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            expected = [{"source": p.source, "target": p.target, "answer": p.answer} for p in pairs]
            assert [json.loads(line) for line in lines] == expected
