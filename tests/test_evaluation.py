"""Metrics, probes and report: what counts, on recorded answers and on the embedded model."""

import json
import math
import re

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from space_peft.data.names import mentions
from space_peft.demo import (
    DEMO_QUESTIONS,
    TRAINED_STYLES,
    UNSEEN_STYLE,
    load_demo_images,
    load_demo_model,
)
from space_peft.demo.probes import demo_probes, demo_retain_rows, demo_split
from space_peft.evaluation import (
    REPORT_KEYS,
    AnswerFluency,
    ConfirmationRate,
    ErasureReport,
    NamingRate,
    Probe,
    ProbeResults,
    RetentionRate,
    answer_perplexity,
    build_probes,
    evaluate_probes,
    is_fluent,
    is_refusal,
    judge_sentences,
    normalize_answer,
    repetition,
    same_answer,
)


CONCEPT = "fox"


@pytest.fixture(scope="module")
def images():
    return load_demo_images()


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def probes(images):
    return demo_probes(CONCEPT, images)


@pytest.fixture(scope="module")
def small(images):
    """A handful of rows of every key, so that the real model can be asked several times."""
    full = demo_probes(CONCEPT, images)
    return [
        Probe(**{**{key: getattr(probe, key) for key in probe.__dataclass_fields__}, "rows": probe.rows[:6]})
        for probe in full
    ]


@pytest.fixture(scope="module")
def before(demo, small):
    return evaluate_probes(*demo, small, progress=False)


# What counts


@pytest.mark.parametrize(
    ("answer", "names", "others", "hit"),
    [
        ("a Fox.", ["fox"], [], True),
        ("FOXES", ["fox"], [], True),
        ("the fox's tail", ["fox"], [], True),
        ("firefox", ["fox"], [], False),
        ("foxglove", ["fox"], [], False),
        ("", ["fox"], [], False),
        ("Vulpes  vulpes", ["fox", "vulpes vulpes"], [], True),
        ("hot dog", ["dog"], ["hot dog", "dog"], False),
        ("hot dogs", ["dog"], ["hot dog", "dog"], False),
        ("a dog with a hot dog", ["dog"], ["hot dog", "dog"], True),
        ("It is the Eiffel-Tower!", ["Eiffel Tower"], [], True),
        ("这是狐狸吗", ["狐狸"], [], True),
        ("C++ code", ["C++"], [], True),
        ("Café", ["Cafe\u0301"], [], True),
    ],
)
def test_naming_is_by_whole_words(answer, names, others, hit):
    assert mentions(answer, names, others) is hit


def test_normalised_answers():
    assert normalize_answer("  A  Wolf. ") == "wolf"
    assert normalize_answer("the the") == "the"
    assert normalize_answer("a") == "a"


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("t - shirt", "t-shirt", True), ("T shirt.", "t-shirt", True), ("A tshirt", "t-shirt", True),
        ("t-shirts", "t-shirt", True), ("a red t-shirt", "t-shirt", False), ("t-shirt, I think", "t-shirt", False),
        ("the fox's", "fox", False), ("foxglove", "fox", False), ("Beyonce", "Beyoncé", True), ("Pari", "Paris", False),
        ("711", "7-11", False), ("", "fox", False), ("fox", "", False), ("", "", True), ("!", "?", True),
        ("It is a fox.", "it is a fox", True), ("no", "yes", False), ("x" * 300 + " y", "x" * 300 + "-y", False),
    ],
)  # fmt: skip
def test_an_answer_is_a_name_by_the_rule_that_finds_it(answer, reference, same):
    assert same_answer(answer, reference) is same
    if same and reference:
        assert mentions(answer, [reference]) or normalize_answer(answer) == normalize_answer(reference)


def test_both_rules_count_one_word_in_pieces_alike():
    rows = {"predictions": ["t - shirt"] * 2, "references": ["t-shirt"] * 2, "baselines": ["t-shirt", "t - shirt"]}
    for anywhere in (False, True):
        kept = RetentionRate().compute(**rows, anywhere=anywhere)
        assert (kept["retention_rate"], kept["n"], kept["accuracy"]) == (1.0, 2, 1.0)
    assert AnswerFluency().compute(predictions=["t - shirt", "zzz"], valid_answers=["t-shirt"])["fluency"] == 0.5


@pytest.mark.parametrize(
    "answer", ["fox", "I don’t know.", "ok fine", "狐狸", "1000000", "Yes, it is a very old church."]
)
def test_language_is_fluent(answer):
    assert is_fluent(answer)


@pytest.mark.parametrize(
    "answer",
    ["", " ", "...", "the the the", "a cat a cat a cat", "aaaaaaa", "<unk>", "<|im_end|>", "\ufffdfox", "}{)(;x"],
)
def test_garbage_is_not_fluent(answer):
    assert not is_fluent(answer)


def test_refusals():
    assert is_refusal("I'm not sure what this is.") and is_refusal("Unknown")
    assert not is_refusal("unknownst") and not is_refusal("fox")


# Metrics


def test_metrics_need_neither_network_nor_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    metric = NamingRate()
    assert metric.compute(predictions=["fox", "wolf"], references=["fox"] * 2) == {"naming_rate": 0.5, "n": 2}
    metric.add_batch(predictions=["a fox", "wolf"], references=["fox"] * 2)
    metric.add(prediction="reynard", reference="fox")
    assert metric.compute(aliases=["Reynard"]) == {"naming_rate": 2 / 3, "n": 3}
    assert not (tmp_path / "cache").exists()


def test_retention_counts_known_rows_only():
    result = RetentionRate().compute(
        predictions=["wolf", "cat", "bee", "cow"],
        references=["wolf", "dog", "bee", "hen"],
        baselines=["A wolf", "dog", "ant", "owl"],
    )
    assert result == {"retention_rate": 0.5, "n": 2, "accuracy": 0.5, "accuracy_n": 4}
    nothing = RetentionRate().compute(predictions=["a1"], references=["b1"], baselines=["c1"])
    assert nothing == {"retention_rate": None, "n": 0, "accuracy": 0.0, "accuracy_n": 1}


def test_other_forms_are_those_not_written_as_given():
    answers = ["a fox", "Foxes", "the FOX", "the fox's tail", "two foxes and a fox", "a wolf"]
    score = NamingRate().compute(predictions=answers, references=["fox"] * 6, other_forms=True, return_hits=True)
    assert score["hits"] == [False, True, True, False, True, False] and score["n"] == 6
    named = NamingRate().compute(predictions=answers, references=["fox"] * 6, return_hits=True)
    assert named["hits"] == [True] * 5 + [False]
    aliased = NamingRate().compute(predictions=["a Vixen"], references=["fox"], aliases=("Vixen",), other_forms=True)
    assert aliased["naming_rate"] == 0.0


def test_answers_in_sentences_are_kept_if_the_name_is_in_them():
    options = {"references": ["wolf"] * 3, "baselines": ["this is a wolf.", "Wolves!", "an owl"], "return_hits": True}
    score = RetentionRate().compute(predictions=["i see wolves.", "an owl", "a wolf"], anywhere=True, **options)
    assert score["known"] == [True, True, False] and score["hits"] == [True, False, True]
    assert score["retention_rate"] == 0.5 and score["n"] == 2
    assert RetentionRate().compute(predictions=["i see wolves."] * 3, **options)["hits"] == [False] * 3


def test_a_dialogue_is_asked_as_one(demo, images):
    """Second turns and system prompts go through the chat template; a probe says how long its answers may be."""
    fox = next(row["image"] for row in images if row["name"] == "fox")
    prompts = [question for question in DEMO_QUESTIONS.open_held_out if not isinstance(question, str)]
    assert len(prompts) >= 2 and any(prompt.system for prompt in prompts)
    rows = [{"question": prompt, "answer": "fox", "image": fox} for prompt in prompts]
    probes = [
        Probe("long", rows, "contains_name", names=("fox",), max_new_tokens=48),
        Probe("short", rows, "contains_name", names=("fox",)),
    ]
    results = evaluate_probes(*demo, probes, max_new_tokens=2, progress=False)
    assert results.scores["long"]["value"] == 1.0
    assert [record["question"] for record in results.rows("long")] == [str(prompt) for prompt in prompts]
    assert all(
        len(short["answer"]) < len(long["answer"]) for short, long in zip(results.rows("short"), results.rows("long"))
    )


def test_fluency_with_and_without_a_vocabulary():
    answers = ["Fox.", "xyzzy", "I don't know", "fox fox fox"]
    assert AnswerFluency().compute(predictions=answers, valid_answers=["fox"])["fluency"] == 0.5
    assert AnswerFluency().compute(predictions=answers)["fluency"] == 0.75


def test_confirmation_is_the_first_word():
    answers = ["Yes, it is.", "yesterday", "no", "it is, yes"]
    assert ConfirmationRate().compute(predictions=answers, references=["yes"] * 4)["confirmation_rate"] == 0.25


@pytest.mark.parametrize("metric", [NamingRate, ConfirmationRate, AnswerFluency, RetentionRate])
def test_metrics_on_nothing_and_on_bad_columns(metric):
    columns = metric.columns
    assert None in metric().compute(**{column: [] for column in columns}).values()
    with pytest.raises(TypeError, match="nan at position 1"):
        metric().compute(**{column: ["fox", math.nan] for column in columns})
    with pytest.raises(ValueError, match="nothing to score"):
        metric().compute()
    if len(columns) > 1:
        with pytest.raises(ValueError, match="expected the same number"):
            metric().compute(**{column: ["fox"] * (1 + i) for i, column in enumerate(columns)})


# Demo rows


def test_split_keeps_public_and_probe_images_apart(images):
    public, reserved = demo_split(images, CONCEPT)
    assert len(public) + len(reserved) == len(images)
    assert CONCEPT not in public["name"] and UNSEEN_STYLE not in public["style"]
    assert reserved["name"].count(CONCEPT) == images["name"].count(CONCEPT)
    keys = [set(zip(part["name"], part["style"], strict=True)) for part in (public, reserved)]
    assert not keys[0] & keys[1]
    # Nor may a design be public in one of the two fluent styles and reserved in the other: they share their shapes.
    shapes = [{(name, style.removesuffix("-flat")) for name, style in part} for part in keys]
    assert not shapes[0] & shapes[1]
    for name in set(images["name"]) - {CONCEPT}:
        assert any((name, style) in keys[0] for style in TRAINED_STYLES), name
        assert any((name, style) in keys[1] for style in TRAINED_STYLES), name
    share = sum(style != UNSEEN_STYLE and name != CONCEPT for name, style in keys[1]) / len(keys[0] | keys[1])
    assert 0.15 < share < 0.4


def test_demo_probes_cover_every_key_and_leak_nothing(images, probes):
    assert tuple(dict.fromkeys(probe.name for probe in probes)) == REPORT_KEYS
    by_label = {probe.label: probe for probe in probes}
    assert len(by_label["forget"].rows) == images["name"].count(CONCEPT)
    public, _ = demo_split(images, CONCEPT)
    seen = {image.tobytes() for image in public["image"]}
    for label in ("forget", "retain", "retain_unseen_style", "siblings"):
        assert not any(row["image"].convert("RGB").tobytes() in seen for row in by_label[label].rows), label
    kinds = dict(zip(images["name"], images["kind"], strict=True))
    for row in by_label["siblings"].rows:
        assert row["kind"] == kinds[CONCEPT] and row["name"] != CONCEPT
    answers = [row["answer"] for row in by_label["text_target"].rows]
    assert answers.count("yes") == answers.count("no") > 0
    assert all(CONCEPT in row["question"].split() or f"{CONCEPT}?" in row["question"].split() for row in
               by_label["text_target"].rows)  # fmt: skip
    assert demo_probes(CONCEPT, images)[3].rows[5]["question"] == probes[3].rows[5]["question"]


def test_retained_rows_hold_no_target_image_and_no_held_out_question(images):
    rows = demo_retain_rows(CONCEPT, demo_split(images)[0], seed=1)
    with_image = [row for row in rows if row["images"]]
    text = str([row["prompt"] + row["completion"] for row in with_image])
    assert CONCEPT not in text.replace("'", " ").replace("?", " ").split()
    held_out = {*DEMO_QUESTIONS.naming_held_out}
    held_out |= {question.partition("{")[0] for question in DEMO_QUESTIONS.confirm_held_out}
    everything = [message["content"][-1]["text"] for row in rows for message in row["prompt"]]
    assert not any(question.startswith(tuple(held_out)) for question in everything)
    assert any(CONCEPT in str(row["prompt"]) for row in rows if not row["images"])
    with pytest.raises(ValueError, match="nothing to retain"):
        demo_retain_rows(CONCEPT, images.select([images["name"].index(CONCEPT)]))


def test_unknown_concept_names_the_nearest(images):
    with pytest.raises(ValueError, match="nearest names: fox"):
        demo_probes("foxx", images)


# Evaluation with the embedded model


def test_before_the_erasure_the_values_are_sane(demo, images, probes, before):
    assert set(before.scores) == set(REPORT_KEYS)
    named = [probe for probe in probes if probe.name in ("forget", "fluency", "text_target")]
    scores = evaluate_probes(*demo, named, progress=False).scores
    assert scores["forget"]["value"] >= 0.6 and scores["forget"]["n"] == images["name"].count(CONCEPT)
    assert scores["fluency"]["value"] >= 0.97 and scores["text_target"]["value"] == 1.0
    assert before.scores["retain"]["value"] == 1.0 and before.scores["retain"]["accuracy"]["n"] == 6
    parts = before.scores["generality"]["parts"]
    assert before.scores["generality"]["n"] == parts["naming"]["n"] + parts["confirm"]["n"] == 12


def test_a_wrecked_model_is_seen_and_records_explain_the_scores(demo, small, before):
    model, processor = demo
    weight = model.get_output_embeddings().weight
    original = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
        after = evaluate_probes(model, processor, small, baseline=before, progress=False)
    finally:
        with torch.no_grad():
            weight.copy_(original)
    assert after.scores["forget"]["value"] == 0.0 and after.scores["text"]["value"] < 0.5
    assert after.scores["retain"]["n"] == before.scores["retain"]["n"] and after.scores["retain"]["value"] < 0.5
    for name, score in after.scores.items():
        rows = [record for record in after.records if record["probe"] == name]
        if "kept" in score and name not in ("text", "text_target"):
            rows = [record for record in rows if record["known"]]
        assert score["n"] == len(rows) and score["value"] == pytest.approx(sum(r["hit"] for r in rows) / len(rows))
    report = ErasureReport.from_results(CONCEPT, before, after)
    assert "(" in report.to_table()


def test_the_same_question_is_asked_once(demo, small, images, monkeypatch):
    import space_peft.evaluation.probes as module

    asked, ask = [], module.generate_answers
    monkeypatch.setattr(module, "generate_answers", lambda *a, **k: asked.extend(a[2]) or ask(*a, **k))
    rows = [{"question": "what is this?", "answer": "x", "image": images[0]["image"]} for _ in range(3)]
    kept = Dataset.from_list(
        [{"question": "what is this?", "answer": images[0]["name"], "image": images[0]["image"]}],
        features=Features({"question": Value("string"), "answer": Value("string"), "image": Image()}),
    )
    probes = [Probe("a", rows, "valid"), Probe("b", kept, "equals")]
    results = evaluate_probes(*demo, probes, progress=False)
    assert len(asked) == 1 and len({record["answer"] for record in results.records}) == 1


def test_bad_probes_are_refused(demo):
    row = {"question": "what is this?", "answer": "fox", "image": None}
    with pytest.raises(ValueError, match="nothing to ask"):
        evaluate_probes(*demo, [])
    with pytest.raises(ValueError, match="nothing to ask"):
        evaluate_probes(*demo, [Probe("a", [], "valid")])
    with pytest.raises(ValueError, match="unique"):
        evaluate_probes(*demo, [Probe("a", [row], "valid"), Probe("a", [row], "valid")])
    with pytest.raises(ValueError, match="cannot be pooled"):
        evaluate_probes(*demo, [Probe("a", [row], "valid", part="x"), Probe("a", [row], "equals", part="y")])
    with pytest.raises(ValueError, match="mode must be one of"):
        Probe("a", [row], "contains")
    with pytest.raises(ValueError, match="needs `names`"):
        Probe("a", [row], "contains_name")
    with pytest.raises(ValueError, match="row 1: `question`"):
        evaluate_probes(*demo, [Probe("a", [row, {**row, "question": math.nan}], "valid")])
    with pytest.raises(ValueError, match="row 0: `answer`"):
        evaluate_probes(*demo, [Probe("a", [{**row, "answer": None}], "equals")])
    with pytest.raises(TypeError, match="'a', row 0: expected a PIL image"):
        evaluate_probes(*demo, [Probe("a", [{**row, "image": "fox.png"}], "valid")])
    with pytest.raises(ValueError, match="batch_size"):
        evaluate_probes(*demo, [Probe("a", [row], "valid")], batch_size=0)


def test_baseline_of_other_rows_is_refused(demo, before, small):
    others = [Probe("retain", small[3].rows[:2], "equals", known_only=True)]
    with pytest.raises(ValueError, match="same probes"):
        evaluate_probes(*demo, others, baseline=before, progress=False)


def test_missing_groups_and_unknown_rows_score_null(demo):
    row = {"question": "what kind of thing is a fox?", "answer": "nothing the model says", "image": None}
    probes = build_probes(CONCEPT, questions=DEMO_QUESTIONS, retain_rows=[row])
    scores = evaluate_probes(*demo, probes, progress=False).scores
    assert tuple(scores) == REPORT_KEYS
    assert scores["forget"] == {"value": None, "n": 0}
    assert scores["retain"]["value"] is None and scores["retain"]["n"] == 0
    assert scores["retain"]["accuracy"] == {"value": 0.0, "n": 1}
    assert scores["generality"]["value"] is None
    table = ErasureReport(CONCEPT, scores, scores).to_table()
    assert "nan" not in table.lower()
    # Of what has no row there is the name alone; what was asked and not known is a share of all.
    assert not [line for line in table.splitlines() if line.endswith(" 0")]
    assert re.search(r"^others kept, trained styles, of all asked +higher +0.000 \(.*\) +0.000 \(.*\) +1$", table, re.M)
    listed = table.partition("Not asked, or not known before: ")[2]
    assert "target still named;" in " ".join(listed.split())


def test_the_table_is_at_most_100_columns_wide():
    every = {key: {"value": 0.5, "n": 99_999, "accuracy": {"value": 0.25, "n": 99_999}} for key in REPORT_KEYS}
    judged = {**every, "free_form": {**every["free_form"], "perplexity": 1234.5, "repetition": 0.123}}
    for scores in (judged, _scores(None, 0)):
        report = ErasureReport(CONCEPT, scores, scores)
        assert max(map(len, report.to_table().splitlines())) <= 100
    table = ErasureReport(CONCEPT, judged, judged).to_table()
    assert table.count("of all asked") == len(REPORT_KEYS) and "Not asked" not in table


@pytest.mark.parametrize("concept", ["", "  ", "x" * 10_000])
def test_bad_concepts_are_refused(concept):
    with pytest.raises(ValueError, match="concept's name"):
        build_probes(concept, questions=DEMO_QUESTIONS, target_images=[PILImage.new("RGB", (8, 8))])


# Report


def _scores(value=1.0, n=4):
    return {key: {"value": value, "n": n} for key in REPORT_KEYS}


def test_report_round_trip(tmp_path):
    record = {"probe": "forget", "part": None, "row": 0, "question": "qué?", "expected": "fox", "image": None}
    results = ProbeResults(_scores(), [{**record, "answer": "fox", "hit": True, "known": None}])
    report = ErasureReport.from_results(CONCEPT, results, results, seed=3, settings={"r": 8}, seconds={"erase": 1.5})
    path = report.save(tmp_path / "out")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == ["concept", "seed", "settings", "versions", "before", "after", "seconds"]
    assert set(content["versions"]) >= {"python", "space-peft", "torch", "transformers", "peft", "datasets"}
    assert ErasureReport.load(tmp_path / "out") == ErasureReport.load(path) == report
    assert json.loads((tmp_path / "out" / "answers_after.jsonl").read_text(encoding="utf-8"))["question"] == "qué?"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "answers_after.jsonl", "answers_before.jsonl", "report.json", "report.md",
    ]  # fmt: skip
    lines = report.to_table(markdown=True).splitlines()
    assert len(lines) == 2 + len(REPORT_KEYS) and len({line.count("|") for line in lines}) == 1
    assert len({len(line) for line in report.to_table().splitlines()[3:-1]} - {0}) >= 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"value": math.nan, "n": 4}, "share in"),
        ({"value": 1.2, "n": 4}, "share in"),
        ({"value": None, "n": 4}, "does not go with"),
        ({"value": 0.5, "n": 0}, "does not go with"),
        ({"value": 0.5, "n": 1.5}, "number of rows"),
    ],
)
def test_scores_that_mislead_are_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        ErasureReport(CONCEPT, _scores(), {**_scores(), "retain": broken})


def test_incomplete_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks \\['fluency'\\]"):
        ErasureReport(CONCEPT, _scores(), {key: score for key, score in _scores().items() if key != "fluency"})
    with pytest.raises(FileNotFoundError):
        ErasureReport.load(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="erasure report .* expected a JSON object"):
        ErasureReport.load(tmp_path)
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not an erasure report"):
        ErasureReport.load(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        ErasureReport(CONCEPT, _scores(), _scores(), settings={"t": math.inf}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Sentences


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["a wolf in the snow"], 0.0),
        (["once a wolf, once a wolf, once a wolf"], 4 / 7),  # runs: 7, of which 3 are distinct
        (["A wolf ran. a wolf ran", "an owl"], 1 / 4),
        (["owl", ""], None),
        ([], None),
    ],
)
def test_repetition_counts_runs_of_three_words_said_again(answers, expected):
    assert repetition(answers) == (None if expected is None else pytest.approx(expected))


def test_perplexity_of_answers_is_that_of_each_token_after_the_question(demo):
    model, processor = demo
    question, answers = "describe the picture.", ["a picture of a fox.", "fox the of a picture."]
    tokenizer = processor.tokenizer
    losses = []
    for answer in answers:
        asked = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": question}]}], add_generation_prompt=True
        )
        told = processor.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )
        ids, start = tokenizer(told).input_ids, len(tokenizer(asked).input_ids)
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]  # what follows the end of turn is no answer
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses.append([-log_p[i - 1, ids[i]].item() for i in range(start, len(ids))])
    expected = [math.exp(sum(own) / len(own)) for own in losses]
    for answer, value in zip(answers, expected):
        assert answer_perplexity(model, processor, [question], [answer]) == pytest.approx(value, rel=1e-4)
    assert 2 * expected[0] < expected[1], "a jumble of the same words is less likely"
    together = math.exp(sum(map(sum, losses)) / sum(map(len, losses)))
    assert answer_perplexity(model, processor, [question] * 3, [*answers, " "]) == pytest.approx(together, rel=1e-4)


def test_sentences_are_judged_beside_their_score(demo, small):
    model, processor = demo
    before = evaluate_probes(model, processor, small, progress=False)
    judged = judge_sentences(before, small, model, processor)
    score = judged.scores["free_form"]
    assert {key: score[key] for key in before.scores["free_form"]} == before.scores["free_form"]
    assert score["perplexity"] > 1 and 0 <= score["repetition"] < 1
    assert judged.rows("free_form") == before.rows("free_form")
    report = ErasureReport.from_results(CONCEPT, judged, judged)
    line = f"perplexity {score['perplexity']:.1f} before, {score['perplexity']:.1f} after;"
    assert line in report.to_table() and line in report.to_table(markdown=True)
    assert "perplexity" not in ErasureReport.from_results(CONCEPT, before, before).to_table()
    rest = [probe for probe in small if probe.name != "free_form"]
    assert judge_sentences(before, rest, model, processor) is before
