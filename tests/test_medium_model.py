"""The medium model's scripts on a tiny configuration: no download, the same classes and the same code."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from example_modules import example_modules
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, PreTrainedTokenizerFast

from space_peft import SpaceLoraConfig
from space_peft.demo import UNSEEN_STYLE
from space_peft.demo.probes import demo_split
from space_peft.modeling.layers import adapted_layers
from space_peft.modeling.prompts import build_batch
from space_peft.modeling.targets import default_target_modules


SCRIPTS = Path(__file__).resolve().parents[1] / "examples" / "medium_model"
STAGES = [[1, 3, 1, 1, 8], [2, 5, 2, 2, 12]]
NAMES = ["owl", "duck"]


@pytest.fixture(scope="module")
def scripts():
    """The example"s modules."""
    with example_modules(SCRIPTS) as load:
        yield load


def tiny_tokenizer(scripts) -> PreTrainedTokenizerFast:
    lessons = scripts("lessons")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [*lessons.SHORT, *NAMES, "user assistant system"]
    for lesson in lessons.LESSONS:
        texts += [*map(str, lesson.prompts), *(lessons.fill(answer, "owl", "bird") for answer in lesson.answers)]
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token=special[0]))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
    )


@pytest.fixture
def tiny(scripts):
    """A tower of three blocks (16 visual tokens), a two-layer language model, and their processor."""
    parts, tower = scripts("parts"), scripts("efficientnet")
    vision = tower.EfficientNetLiteConfig(image_size=16, patch_size=4, stem_channels=8, stages=STAGES, hidden_size=20)
    text = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    tokenizer = tiny_tokenizer(scripts)
    processor = parts.build_processor(tokenizer, vision)
    torch.manual_seed(0)
    model = parts.assemble(vision, text, tokenizer).eval()
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        for parameter in part.parameters():  # a fresh model hardly sees its images
            parameter.data.normal_(std=0.3)
    return model, processor


@pytest.fixture
def joining(scripts, tiny, demo_images):
    """`(join module, model, adapter, processor, bank, lessons, settings)` with two concepts and a tiny model."""
    join = scripts("join")
    model, processor = tiny
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    settings = join.JoinSettings(
        copies=2, warm_steps=2, warm_batch_size=8, steps=6, name_steps=2, batch_size=4, text_rows=2, lora_rank=2,
        save_every=1,
    )  # fmt: skip
    pairs = zip(demo_images["name"], demo_images["style"])
    rows = demo_images.select([i for i, (name, style) in enumerate(pairs) if name in NAMES and style != UNSEEN_STYLE])
    bank = join.build_bank(model, processor, rows, NAMES, copies=2, amount=0.4, seed=0)
    general = [("What is this?", "duck"), ("Name it.", "owl"), ("Caption this.", "A colorful drawing of a duck.")]
    lessons = join.Lessons(dict.fromkeys(NAMES, "bird"), {key: {} for key in scripts("lessons").OWN_WORDS}, general)
    return join, model, join.add_lora(model, settings), processor, bank, lessons, settings


def published_features(state: dict, x: torch.Tensor) -> torch.Tensor:
    """The network as published: convolutions, batch normalisation, no linear layer."""

    def norm(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, eps=1e-3)

    def convolve(x, name, stride=1):
        weight = state[f"{name}.weight"]
        size, k = x.shape[-1], weight.shape[-1]
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        x = F.pad(x, [total // 2, total - total // 2] * 2)
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)

    x = F.relu6(norm(convolve(x, "_conv_stem", 2), "_bn0"))
    block = 0
    for count, _, stride, expansion, _ in STAGES:
        for i in range(count):
            name, y = f"_blocks.{block}", x
            if expansion > 1:
                y = F.relu6(norm(convolve(y, f"{name}._expand_conv"), f"{name}._bn0"))
            y = F.relu6(norm(convolve(y, f"{name}._depthwise_conv", stride if i == 0 else 1), f"{name}._bn1"))
            y = norm(convolve(y, f"{name}._project_conv"), f"{name}._bn2")
            x = x + y if x.shape == y.shape else y
            block += 1
    return F.relu6(norm(convolve(x, "_conv_head"), "_bn1"))


def test_linear_tower_is_the_published_network(tiny):
    """1 x 1 convolutions as linear layers and folded statistics: the same function, in float64."""
    tower = tiny[0].model.vision_tower.double()
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {}

    def add(conv, norm, out_channels, in_channels, kernel_size):
        state[f"{conv}.weight"] = random(out_channels, in_channels, kernel_size, kernel_size)
        state[f"{norm}.weight"], state[f"{norm}.bias"] = random(out_channels), random(out_channels)
        state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = random(out_channels), random(out_channels).exp()

    add("_conv_stem", "_bn0", 8, 3, 3)
    channels, block = 8, 0
    for count, kernel_size, _, expansion, out_channels in STAGES:
        for _ in range(count):
            width, name = channels * expansion, f"_blocks.{block}"
            if expansion > 1:
                add(f"{name}._expand_conv", f"{name}._bn0", width, channels, 1)
            add(f"{name}._depthwise_conv", f"{name}._bn1", width, 1, kernel_size)
            add(f"{name}._project_conv", f"{name}._bn2", out_channels, width, 1)
            channels, block = out_channels, block + 1
    add("_conv_head", "_bn1", 20, channels, 1)
    tower.load_published(state)
    x = random(3, 3, 16, 16)
    expected = published_features(state, x)  # (n, c, h, w)
    assert 0.05 < ((expected > 0) & (expected < 6)).double().mean() < 0.95  # not all clipped
    torch.testing.assert_close(tower(x).last_hidden_state, expected.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-9)


def test_vision_target_adapts_every_pointwise_convolution(tiny):
    model = tiny[0]
    pattern = default_target_modules(model, "vision")
    adapted = set(adapted_layers(get_peft_model(model, SpaceLoraConfig(r=2, target_modules=pattern))))
    tower = model.model.vision_tower
    linear = {f"model.vision_tower.{name}" for name, m in tower.named_modules() if hasattr(m, "lora_A")}
    # The first block does not expand; head and projector count too.
    assert len(linear) == 2 * len(tower.blocks) - 1 + 1
    assert adapted == linear | {f"model.multi_modal_projector.linear_{i}" for i in (1, 2)}
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in tower.modules())


def test_names_come_first_and_leave_the_language_model_alone(joining, tmp_path):
    join, model, adapter, processor, bank, lessons, settings = joining
    before = {name: value.clone() for name, value in model.state_dict().items()}
    join.warm_start(model, processor, bank, settings)
    settings = dataclasses.replace(settings, steps=2)
    log = join.teach(model, adapter, processor, bank, lessons, settings, tmp_path / "join.pt")
    assert [entry["step"] for entry in log] == [1, 2] and not any("general" in entry for entry in log)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    for step in range(4):
        prompts, answers = join.draw_pictures(bank, lessons, settings, step)[1:]
        assert step >= settings.name_steps or set(answers) <= set(NAMES), (step, prompts, answers)


def test_taught_model_is_a_plain_one_and_reloads(joining, demo_images, tmp_path):
    """The LoRA ends up in the language model's linear layers, nothing else but the projector changes."""
    join, model, adapter, processor, bank, lessons, settings = joining
    before = {name.replace(".base_layer", ""): value.clone() for name, value in model.state_dict().items()}
    log = join.teach(model, adapter, processor, bank, lessons, settings, tmp_path / "join.pt")
    assert all(entry["general"] >= 0 for entry in log[2:]) and log[-1]["general"] > 0
    question = ["What can you see in this image?"]
    batch = build_batch(processor, question, images=demo_images[:1]["image"], answers=["I can see an owl."])
    batch.pop("labels")
    with torch.no_grad():
        adapted = model(**batch).logits
    model = adapter.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, adapted, rtol=1e-4, atol=1e-4)
    state = model.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    taught = {name for name in linear if ".language_model.layers." in name}
    assert changed == taught | {name for name in state if "multi_modal_projector" in name}

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    images = demo_images[:2]["image"]
    questions = ["What is this?", "Name it. Answer with the name only."]
    batches = [
        build_batch(p, questions, images=images, answers=NAMES)
        for p in (processor, AutoProcessor.from_pretrained(tmp_path / "model"))
    ]
    assert (batches[0]["input_ids"] == model.config.image_token_id).sum() == 2 * 16
    for key, value in batches[0].items():
        assert torch.equal(value, batches[1][key]), key
    batches[0].pop("labels")
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, loaded(**batches[0]).logits)


def test_features_in_training_are_those_of_the_whole_model(joining, demo_images):
    """`answer_logits` bypasses the tower; its logits must be the model's own on the same drawing."""
    join, model, _, processor, bank, _, _ = joining
    row = next(i for i, name in enumerate(demo_images["name"]) if name == NAMES[bank.concept[0]])
    batch = build_batch(processor, ["What is this?"], images=[demo_images[row]["image"]], answers=["owl"])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits, _ = join.answer_logits(model, processor, bank.features[:1, 0].float(), ["What is this?"], ["owl"])
        whole = model(**batch, logits_to_keep=join.answer_columns(labels)).logits
        other, _ = join.answer_logits(model, processor, bank.features[:1, 0].float() * 2, ["What is this?"], ["owl"])
    # The bank is in half precision.
    error, difference = (logits - whole).abs().max(), (logits - other).abs().max()
    assert error < 0.005 * whole.abs().max() and difference > 20 * error


def test_general_divergence_is_that_of_the_adapter_alone(joining):
    join, model, adapter, processor, _, lessons, settings = joining
    untaught = join.general_divergence(model, adapter, processor, lessons, settings, 0)
    assert untaught.item() == 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    assert join.general_divergence(model, adapter, processor, lessons, settings, 0).item() > 1e-3


def test_interrupted_teaching_ends_with_the_same_weights(joining, tmp_path):
    join, model, adapter, processor, bank, lessons, settings = joining
    parts = (adapter, processor, bank, lessons, settings)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    join.teach(model, *parts, tmp_path / "whole.pt")
    whole = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupt():
        raise KeyboardInterrupt

    model.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        join.teach(model, *parts, tmp_path / "join.pt", probe=interrupt)  # in the fourth step, the LoRA's second
    model.load_state_dict(start)
    log = join.teach(model, *parts, tmp_path / "join.pt")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name
        assert torch.equal(value, start[name]) != ("lora_" in name or "projector" in name), name

    other = dataclasses.replace(settings, lr=1.0)
    with pytest.raises(ValueError, match="was made with"):
        join.teach(model, adapter, processor, bank, lessons, other, tmp_path / "join.pt")


def test_build_and_report(scripts, tiny, demo_images, tmp_path, monkeypatch):
    """The command's two halves; the second alone is repeated where the first is done."""
    join, text = scripts("join"), scripts("text_knowledge")
    images = demo_images.select([i for i, name in enumerate(demo_images["name"]) if name in NAMES])
    asked = []

    def answers(model, processor, questions, **kwargs):
        asked.extend(questions)
        return ["An owl, not a duck."] * len(questions)

    monkeypatch.setattr(join, "build_model", lambda work, seed: tiny)
    monkeypatch.setattr(join, "load_demo_images", lambda: images)
    monkeypatch.setattr(join, "generate_answers", answers)
    for module in (join, text):
        monkeypatch.setattr(module, "KNOWLEDGE", (("Which bird hunts at night?", "owl"), ("Which sings?", "lark")))
    settings = join.JoinSettings(
        copies=1, warm_steps=1, warm_batch_size=8, steps=3, name_steps=1, batch_size=2, text_rows=2, lora_rank=2
    )
    join.build(tmp_path, settings, torch.float32)
    prompts = [*join.own_words_prompts(NAMES).values(), *join.general_prompts(sorted(NAMES))]
    assert set(asked) == {"Which bird hunts at night?", "Which sings?", *prompts}
    figures = join.report(tmp_path, settings, torch.float32)
    assert figures["knowledge"]["right_before"] == figures["knowledge"]["still_right"] == 1
    assert figures["accuracy"]["open_held_out, trained styles"]["named"] == 1
    assert figures["perplexity"]["before"] != figures["perplexity"]["after"]
    assert figures["log"][-1]["step"] == 3 and json.loads((tmp_path / "model" / "figures.json").read_text()) == figures
    with pytest.raises(ValueError, match="and the model"):
        join.report(tmp_path, dataclasses.replace(settings, seed=1), torch.float32)


def test_answers_are_counted_by_group_and_style(joining, demo_images, monkeypatch):
    join, model, _, processor, _, _, _ = joining
    images = demo_images.select([i for i, name in enumerate(demo_images["name"]) if name in NAMES])

    def answers(model, processor, questions, **kwargs):
        return ["Two owls." if "name only" in str(question) else "owl" for question in questions]

    monkeypatch.setattr(join, "generate_answers", answers)
    scores, records = join.measure(model, processor, images, seed=0, groups=("naming", "open"))
    owls = sum(name == "owl" for name in images["name"])
    assert sum(score["n"] for score in scores.values()) == len(records) == 2 * len(images)
    for group, exact in (("naming", 0), ("open", 1)):
        styles = [score for label, score in scores.items() if label.startswith(f"{group}, ")]
        assert len(styles) == 2
        assert sum(score["named"] * score["n"] for score in styles) == pytest.approx(owls)
        assert sum(score["exact"] * score["n"] for score in styles) == pytest.approx(owls * exact)


def test_held_out_questions_are_not_taught(scripts, demo_images):
    """Neither those about pictures nor those about the world, and nothing is distilled that is measured."""
    tasks, lessons, knowledge = scripts("tasks"), scripts("lessons"), scripts("knowledge")
    taught = {*lessons.SHORT, *(prompt for lesson in lessons.LESSONS for prompt in lesson.prompts)}
    assert set(tasks.QUESTIONS.naming) <= taught and len(taught) > 30
    assert not taught & {*tasks.QUESTIONS.naming_held_out, *tasks.QUESTIONS.open_held_out}
    asked = [question for question, _ in knowledge.KNOWLEDGE]
    assert len(asked) == len(set(asked)) > 400
    names = sorted(set(demo_images["name"]))
    assert not {*asked, *(question for question, _ in tasks.WORLD)} & set(lessons.general_prompts(names))
    held_out = {question.format(name=name) for question in tasks.TARGET_TEXT_HELD_OUT for name in names}
    assert not held_out & {*lessons.general_prompts(names), *lessons.own_words_prompts(names).values()}


@pytest.mark.parametrize(
    ("name", "article", "plural"),
    [("owl", "an owl", "owls"), ("cherries", "cherries", "cherries"), ("wolf", "a wolf", "wolves"),
     ("corn", "some corn", "corn"), ("tennis", "tennis", "tennis"), ("maple leaf", "a maple leaf", "maple leaves")],
)  # fmt: skip
def test_names_in_sentences(scripts, name, article, plural):
    lessons = scripts("lessons")
    assert (lessons.with_article(name), lessons.plural(name)) == (article, plural)
    for lesson in lessons.LESSONS:
        for template in lesson.answers:
            sentence = lessons.fill(template, name, "meal")
            assert lessons.is_named(sentence, name) and sentence[0].isupper() and "{" not in sentence
    this = "These are" if name in lessons.PLURAL_NAMES else "This is"
    assert lessons.fill("{this} {a}.", name, "meal") == f"{this} {article}."


def test_any_number_of_it_names_a_concept(scripts):
    is_named = scripts("lessons").is_named
    assert is_named("There is a cherry here.", "cherries") and is_named("Wolves!", "wolf") and is_named("an OWL", "owl")
    assert not is_named("It looks like a bird.", "owl") and not is_named("a wolfhound", "wolf")


def test_own_words_are_one_sentence_that_names_the_concept(scripts):
    lessons = scripts("lessons")
    assert lessons.own_words("fact", "owl", "Owls hunt at night. They see well.") == "Owls hunt at night."
    assert lessons.own_words("sentence", "owl", "The owl sat. It").endswith("an owl. The owl sat.")
    assert lessons.own_words("fact", "owl", "Birds hunt at night.") is None
    assert lessons.own_words("fact", "owl", "Owls hunt at night and then they") is None


def test_knowledge_counts_what_was_right_before(scripts):
    join, knowledge = scripts("join"), scripts("knowledge").KNOWLEDGE
    right = [expected.split("|")[-1] for _, expected in knowledge]
    wrong = ["no idea"] * len(knowledge)
    counts, known = join.knowledge_kept([*right[:8], *wrong[8:]], [*right[:4], *wrong[4:8], *right[8:]])
    assert counts["right_before"] == len(known) == 8 and counts["kept"] == 0.5 and counts["same_words"] == 4
    assert join.knowledge_kept(wrong, right)[0]["kept"] is None


def test_probes_and_retained_rows_are_disjoint(scripts, demo_images):
    """No image of the target and no probe, image or question, is among the retained rows."""
    tasks, erase = scripts("tasks"), scripts("erase")
    world = {question for question, _ in tasks.WORLD}
    assert len(world) == 10 and not world & set(tasks.GENERAL)
    assert not set(tasks.TARGET_TEXT) & set(tasks.TARGET_TEXT_HELD_OUT)
    concept = "owl"
    public, _ = demo_split(demo_images, concept)
    probes = {
        row["image"].tobytes()
        for probe in erase.image_probes(concept, demo_images)
        for row in probe.rows
        if row["image"] is not None
    }
    assert len(probes) > 80 and not probes & {image.tobytes() for image in public["image"]}
    assert tasks.is_right("It is Mars.", "Mars") and not tasks.is_right("Marsupials.", "Mars")


def test_picture_shows_what_was_measured(scripts, tmp_path):
    """A score that changes changes the picture, and a score without rows does not break it."""
    picture = scripts("picture")

    def pixels(kept: float, known: float | None) -> bytes:
        scores = {key: {"value": kept, "n": 4} for key, _ in picture.BARS[:5]}
        scores |= {"siblings": {"value": known, "n": 0}, "target_tokens": 0.9, "world_right": 9, "perplexity": 20.0}
        results = [
            {"concept": "owl", "variant": t, "steps": 3, "before": scores, "after": scores} for t in picture.TITLES
        ]
        picture.draw({"erasures": results}, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as drawn:
            return drawn.tobytes()

    assert len({pixels(0.5, 1.0), pixels(0.6, 1.0), pixels(0.5, None)}) == 3
