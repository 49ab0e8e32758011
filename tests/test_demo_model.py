"""The embedded model is what its published figures say, and loads as any model does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

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
    """The modules the model was made with; they import each other by bare name, as scripts do."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    try:
        import measure
        import packing
        import warm_start

        yield {"measure": measure, "packing": packing, "warm_start": warm_start}
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in set(sys.modules) - before:
            if (SCRIPTS / f"{name}.py").exists():
                del sys.modules[name]


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


def test_vocabulary_covers_every_question_and_answer(loaded, images):
    _, processor = loaded
    texts = set(images["name"]) | set(images["kind"]) | {"yes", "no"}
    groups = (DEMO_QUESTIONS.naming, DEMO_QUESTIONS.naming_held_out, DEMO_QUESTIONS.confirm)
    groups += (DEMO_QUESTIONS.confirm_held_out, KIND_QUESTIONS, TEXT_KIND_QUESTIONS, TEXT_CONFIRM_QUESTIONS)
    texts |= {q.format(name="fox", kind="bird") for group in groups for q in group}
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
    asked = [("what is this?", row["name"]), ("is this a fox?", "no"), ("what kind of thing is this?", row["kind"])]
    pixels = processor.image_processor([row["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        packed = packing.pack([[maker(*qa) for qa in asked]], processor, image=True)
        logits, _ = packing.answer_logits(model, packed, image_features(model, pixels))
        alone = []
        for question, answer in asked:
            turns = [user(question, row["image"])]
            start = processor.apply_chat_template(turns, add_generation_prompt=True)
            text = processor.apply_chat_template([*turns, assistant(answer)])
            batch = processor(text=[text], images=[row["image"]], return_tensors="pt")
            first = processor(text=[start], images=[row["image"]], return_tensors="pt")["input_ids"].shape[1]
            alone.append(model(**batch).logits[0, first - 1 : -1])
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=1e-4)


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
    assert summary["text | text_kind"] >= 0.98
    assert summary["text | text_confirm"] >= 0.98
