"""The embedded model is what its published figures say, and loads as any model does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_modules import example_modules
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from space_peft.data.questions import Dialogue
from space_peft.demo import (
    DEMO_QUESTIONS,
    KIND_QUESTIONS,
    TEXT_CONFIRM_QUESTIONS,
    TEXT_KIND_QUESTIONS,
    TRAINED_STYLES,
    UNSEEN_STYLE,
    demo_model_path,
    load_demo_images,
    load_demo_model,
)
from space_peft.modeling.prompts import conversation, encode_conversations


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "demo_model"
LICENCES = {
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "fxemoji": "Apache-2.0",
    "fluent-emoji": "MIT",
    "fluent-emoji-flat": "MIT",
}


@pytest.fixture(scope="module")
def scripts():
    """The modules the model was made with."""
    with example_modules(SCRIPTS) as load:
        yield {name: load(name) for name in ("measure", "packing", "sentences", "templates", "warm_start")}


@pytest.fixture(scope="module")
def images():
    return load_demo_images()


@pytest.fixture(scope="module")
def loaded():
    return load_demo_model()


@pytest.fixture(scope="module")
def figures():
    return json.loads((demo_model_path() / "figures.json").read_text(encoding="utf-8"))


def user(text, image=None):
    parts = [{"type": "image"}] if image is not None else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_images(images):
    names, kinds, styles = images["name"], images["kind"], images["style"]
    assert len(set(names)) >= 110 and len(set(kinds)) >= 15
    assert set(styles) == {UNSEEN_STYLE, *TRAINED_STYLES}
    assert len(set(zip(names, styles, strict=True))) == len(images)
    rows = list(zip(kinds, names, styles, strict=True))
    assert rows == sorted(rows)
    kind_of = dict(zip(names, kinds, strict=True))
    assert len(set(zip(names, kinds, strict=True))) == len(kind_of), "a concept has one kind"
    assert min(list(kind_of.values()).count(kind) for kind in kind_of.values()) >= 5, "every concept has siblings"
    first = images[0]["image"]
    assert first.mode == "RGB" and first.size == (96, 96)


def test_every_concept_has_an_image_of_each_side(images):
    seen = {name for name, style in zip(images["name"], images["style"], strict=True) if style in TRAINED_STYLES}
    unseen = {name for name, style in zip(images["name"], images["style"], strict=True) if style == UNSEEN_STYLE}
    assert seen == unseen == set(images["name"])


def test_only_licences_that_allow_embedding(images):
    for style, licence in zip(images["style"], images["licence"], strict=True):
        assert licence == LICENCES[style]
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for style in LICENCES:
        assert f"@iconify-json/{style} " in notice
    assert "unicode-emoji-json" in notice


def test_size_of_what_is_checked_in():
    folder = demo_model_path()
    files = [p for p in folder.rglob("*") if p.is_file()] + [folder.parent / "images.parquet"]
    assert sum(p.stat().st_size for p in files) <= 15e6


def test_unseen_style_was_not_trained_on(figures):
    assert figures["unseen_style"] == UNSEEN_STYLE
    assert set(figures["training"]["styles"]) == set(TRAINED_STYLES)
    assert set(figures["training"]["sentences"]["styles"]) == set(TRAINED_STYLES)
    # The two fluent sets are one design: either both are seen or neither is.
    assert not UNSEEN_STYLE.startswith("fluent")


def test_training_code_cannot_reach_the_unseen_style(scripts, tmp_path):
    import drawings
    import numpy as np
    from concepts import KINDS

    emoji = [e for members in KINDS.values() for e in members.values()]
    styles = [UNSEEN_STYLE, *TRAINED_STYLES]
    np.savez(
        tmp_path / "emoji.npz",
        images=np.full((len(emoji) * len(styles), 8, 8, 4), 200, dtype=np.uint8),
        emoji=np.repeat(np.arange(len(emoji)), len(styles)),
        style=np.array(styles * len(emoji)),
        names=np.array(emoji),
        groups=np.array(["Objects"] * len(emoji)),
    )
    loaded_drawings = drawings.load_drawings(tmp_path)
    assert set(loaded_drawings.style) == set(TRAINED_STYLES)
    assert len(loaded_drawings.style) == len(emoji) * len(TRAINED_STYLES)


def test_third_stage_sees_the_trained_styles_as_they_are(scripts, images):
    import numpy as np
    from augment import on_white
    from PIL import Image

    drawings = scripts["sentences"].shipped_drawings()
    assert set(drawings.style) == set(TRAINED_STYLES)
    assert len(drawings.style) == sum(style in TRAINED_STYLES for style in images["style"])
    size = drawings.rgba.shape[-2:]
    for i in range(0, len(drawings.style), 50):
        expected = np.asarray(drawings.white[i].resize(size, Image.LANCZOS))
        got = on_white(drawings.rgba[i : i + 1].float() / 255)[0].permute(1, 2, 0) * 255
        assert abs(got.numpy() - expected).max() < 0.01


def test_new_words_leave_the_old_ones_as_they_are(scripts):
    import build

    old = build.build_processor()
    model = build.build_model(old.tokenizer, 0)
    before = model.get_input_embeddings().weight.detach().clone()
    processor = scripts["sentences"].extend_vocabulary(model, old, seed=0)
    known, words = old.tokenizer.get_vocab(), processor.tokenizer.get_vocab()
    assert len(words) > len(known) and known.items() <= words.items()
    after = model.get_input_embeddings().weight
    assert after is model.get_output_embeddings().weight
    assert after.shape[0] == len(words) == model.config.text_config.vocab_size
    assert torch.equal(after[: len(known)], before)
    similar = torch.cosine_similarity(after[words["foxes"]][None], after, dim=1)
    assert similar.topk(2).indices.tolist() == [words["foxes"], words["fox"]]
    with pytest.raises(ValueError, match="beginning"):
        other = build.build_processor()
        other.tokenizer = build.build_tokenizer(["some other words"])
        scripts["sentences"].extend_vocabulary(model, other, seed=0)


def test_open_questions_and_their_templates(scripts):
    templates = scripts["templates"]
    assert len(DEMO_QUESTIONS.open) >= 5 and len(DEMO_QUESTIONS.open_held_out) >= 6
    dialogues = [question for question in DEMO_QUESTIONS.open_held_out if isinstance(question, Dialogue)]
    assert any(len(dialogue.turns) > 1 for dialogue in dialogues) and any(dialogue.system for dialogue in dialogues)
    for question in templates.OPEN_QUESTIONS:
        assert len(set(templates.TEMPLATES[str(question)])) >= 4
        for name in templates.name_forms():
            for sentence in templates.sentences(question, name):
                assert sentence.endswith(".") and len(sentence.split()) <= 14, sentence
                assert templates.named_right(sentence, name) and templates.article_right(sentence, name), sentence
    known = [template for group in templates.TEMPLATES.values() for template in group]
    for place in ("{one} ", " {one} ", " {one}.", "{many}", "{a_kind}"):
        assert sum(place in template for template in known) >= 3, place


def test_how_sentences_are_judged(scripts):
    templates = scripts["templates"]
    for answer, name, named, article in (
        ("an owl is shown.", "owl", True, True),
        ("a owl is shown.", "owl", True, False),
        ("owl is shown.", "owl", True, False),
        ("it is about wolves.", "wolf", True, True),
        ("a wolves is here.", "wolf", True, False),
        ("once there were some fries. the fries were good.", "fries", True, True),
        ("a fries.", "fries", True, False),
        ("here is some owl.", "owl", True, False),
        ("this is tennis.", "tennis", True, True),
        ("this is some tennis.", "tennis", True, False),
        ("a pineapple.", "pine", False, False),
        ("a fox and a wolf.", "fox", False, True),
        ("it is nice.", "fox", False, True),
    ):
        assert templates.named_right(answer, name) == named, answer
        assert templates.article_right(answer, name) == article or not named, answer


@pytest.fixture(scope="module")
def one_of_each_kind(images):
    rows = {}
    for i, (kind, style) in enumerate(zip(images["kind"], images["style"], strict=True)):
        if style == TRAINED_STYLES[0]:
            rows.setdefault(kind, i)
    return images.select(list(rows.values())[::2])


def test_greedy_answers_vary(scripts, loaded, one_of_each_kind):
    templates = scripts["templates"]
    used = {question: [] for question in templates.OPEN_QUESTIONS}
    for question, _, answer in scripts["measure"].open_answers(*loaded, one_of_each_kind, per_image=len(used)):
        used[question].append(templates.templates_by_sentence(question).get(answer))
    for question, found in used.items():
        assert len(set(found) - {None}) >= 2, question
    assert len({template for found in used.values() for template in found}) >= 3 * len(used)
    assert sum(found.count(None) for found in used.values()) <= 0.1 * len(used) * len(one_of_each_kind)


def test_at_least_four_templates_are_likely_answers(scripts, loaded, one_of_each_kind):
    model, processor = loaded
    templates, packing = scripts["templates"], scripts["packing"]
    maker = packing.SegmentMaker(processor)
    pixels = processor.image_processor(list(one_of_each_kind["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = scripts["warm_start"].image_features(model, pixels)
    for question in templates.OPEN_QUESTIONS:
        known = templates.TEMPLATES[str(question)]
        rows = []
        for name in one_of_each_kind["name"]:
            fields = templates.name_forms()[name].fields
            rows.append([maker(question, template.format(**fields)) for template in known])
        packed = packing.pack(rows, processor, image=True)
        with torch.no_grad():
            logits, target = packing.answer_logits(model, packed, features)
        log_probs = torch.zeros(packed.target.shape)
        log_probs[packed.target != -100] = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
        likely = [log_probs.masked_fill(packed.segment != k, 0).sum(1).exp().mean() for k in range(len(known))]
        assert sum(p >= 0.02 for p in likely) >= 4, (question, likely)


@pytest.mark.slow
def test_loads_through_auto_classes_without_a_warning():
    code = (
        "import warnings, sys; warnings.simplefilter('error')\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "from transformers.utils import logging; logging.disable_progress_bar()\n"
        f"AutoModelForImageTextToText.from_pretrained({str(demo_model_path())!r})\n"
        f"AutoProcessor.from_pretrained({str(demo_model_path())!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.strip() == ""


def test_is_a_stock_model():
    model = AutoModelForImageTextToText.from_pretrained(demo_model_path())
    processor = AutoProcessor.from_pretrained(demo_model_path())
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert model.dtype == torch.float16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_generation_prompt_is_a_prefix_of_the_answered_conversation(loaded, images):
    _, processor = loaded
    image = images[0]["image"]
    for turn in (user("what is this?", image), user("what kind of thing is a fox?"), {"role": "user", "content": "hi"}):
        asked = processor.apply_chat_template([turn], add_generation_prompt=True)
        answered = processor.apply_chat_template([turn, assistant("fox")])
        assert answered.startswith(asked) and answered.endswith("fox</s>")
        again = processor.apply_chat_template([turn, assistant("fox"), user("is a fox a bird?")])
        assert again.startswith(answered)
    assert processor.apply_chat_template([user("what is this?", image)], add_generation_prompt=True) == (
        "<s><image>question: what is this? answer:"
    )


def test_vocabulary_covers_every_question_and_answer(scripts, loaded, images):
    _, processor = loaded
    texts = set(images["name"]) | set(images["kind"]) | {"yes", "no"}
    groups = (DEMO_QUESTIONS.naming, DEMO_QUESTIONS.naming_held_out, DEMO_QUESTIONS.confirm)
    groups += (DEMO_QUESTIONS.confirm_held_out, KIND_QUESTIONS, TEXT_KIND_QUESTIONS, TEXT_CONFIRM_QUESTIONS)
    texts |= {q.format(name="fox", kind="bird") for group in groups for q in group}
    texts |= {*scripts["templates"].sentence_texts()}
    for question in DEMO_QUESTIONS.open + DEMO_QUESTIONS.open_held_out:
        texts.add(processor.apply_chat_template(conversation(question)["prompt"], add_generation_prompt=True))
    for text in sorted(texts) + ["What IS This?"]:
        ids = processor.tokenizer(text)["input_ids"]
        assert ids and processor.tokenizer.unk_token_id not in ids, text
    for answer in sorted(set(images["name"]) | set(images["kind"])):
        assert processor.decode(processor.tokenizer(answer)["input_ids"]) == answer


def generate(model, processor, turns, images=None):
    """Greedy answers as a user of transformers would get them."""
    texts = [processor.apply_chat_template([turn], add_generation_prompt=True) for turn in turns]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=6, do_sample=False)
    return [t.strip() for t in processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]


def test_text_only_rows(loaded):
    model, processor = loaded
    turns = [user("what kind of thing is a fox?"), user("is a piano a bird?"), user("Is a piano a instrument?")]
    assert generate(model, processor, turns) == ["mammal", "no", "yes"]


def test_packed_questions_equal_separate_ones(scripts, loaded, images):
    """The figures are taken with several questions in one sequence; here they are asked one by one."""
    model, processor = loaded
    packing, image_features = scripts["packing"], scripts["warm_start"].image_features
    row = images[100]
    maker = packing.SegmentMaker(processor)
    several_turns, with_system = (
        next(q for q in DEMO_QUESTIONS.open_held_out if isinstance(q, Dialogue) and (q.system is not None) == wanted)
        for wanted in (False, True)
    )
    asked = [("what is this?", row["name"]), ("is this a fox?", "no"), ("what kind of thing is this?", row["kind"])]
    asked += [("what are these?", "these are foxes."), (several_turns, "i found a fox in it.")]
    pixels = processor.image_processor([row["image"]], return_tensors="pt")["pixel_values"]
    for group in (asked, [(with_system, "children, this image shows a fox."), (with_system, "an owl.")]):
        with torch.no_grad():
            packed = packing.pack([[maker(*qa) for qa in group]], processor, image=True)
            logits, _ = packing.answer_logits(model, packed, image_features(model, pixels))
            alone = []
            for question, answer in group:
                batch = encode_conversations(processor, [conversation(question, answer=answer, image=row["image"])])
                answered = int((batch.pop("labels") != -100).sum())
                alone.append(model(**batch).logits[0, -answered - 1 : -1])
        torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="before the image"):
        packing.pack([[maker(*asked[0]), maker(with_system, "an owl.")]], processor, image=True)


def test_figures_are_those_of_generation(scripts, loaded, images):
    """`answered_exactly` decides in one pass what greedy generation through the processor would give."""
    model, processor = loaded
    packing, image_features = scripts["packing"], scripts["warm_start"].image_features
    part = images.select(range(0, len(images), 13))
    question = DEMO_QUESTIONS.naming[0]
    answers = generate(model, processor, [user(question, 1)] * len(part), list(part["image"]))
    maker = packing.SegmentMaker(processor)
    pixels = processor.image_processor(list(part["image"]), return_tensors="pt")["pixel_values"]
    packed = packing.pack([[maker(question, name)] for name in part["name"]], processor, image=True)
    hits = packing.answered_exactly(model, packed, image_features(model, pixels))
    assert [a == n for a, n in zip(answers, part["name"], strict=True)] == [hit for (hit,) in hits]


@pytest.mark.slow  # Twelve thousand answers; weights and figures are made by one script, and `test_thresholds` reads them.
def test_published_figures(scripts, loaded, images, figures):
    got = scripts["measure"].measure(*loaded, images)
    for part, published in figures["accuracy"].items():
        assert got[part].keys() == published.keys()
        for key, figure in published.items():
            assert got[part][key]["n"] == figure["n"], key
            # Another CPU rounds differently, which may turn one answer that is nearly tied.
            assert abs(got[part][key]["value"] - figure["value"]) <= 1.01 / figure["n"] + 1e-4, (part, key)


def test_thresholds(figures):
    summary = {key: figure["value"] for key, figure in figures["accuracy"]["summary"].items()}
    first = DEMO_QUESTIONS.naming[0]
    questions = {key: figure["value"] for key, figure in figures["accuracy"]["per_question"].items()}
    assert questions[f"trained styles | naming: {first}"] >= 0.97
    assert questions[f"unseen style | naming: {first}"] >= 0.60
    for question, value in questions.items():  # every wording, not the mean of them
        if question.startswith(("trained styles | naming:", "trained styles | kind:")):
            assert value >= 0.97, question
        if question.startswith("trained styles | confirm"):
            assert value >= 0.85, question
        if question.startswith("unseen style | naming:"):
            assert value >= 0.60, question
    for part in ("confirm", "confirm yes", "confirm no", "confirm no (sibling)"):
        assert summary[f"trained styles | {part}"] >= 0.85, part
    for part in ("open", "open_held_out", "open_article", "open_held_out_article"):
        assert summary[f"trained styles | {part}"] >= 0.95, part
        assert summary[f"unseen style | {part}"] >= 0.60, part
    assert summary["text | text_kind"] >= 0.98
    assert summary["text | text_confirm"] >= 0.98
