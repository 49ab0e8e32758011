"""Every supported architecture from anchors to an adapter that stock PEFT loads, on tiny models with real processors."""

import re

import architectures
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from rounding import logit_tolerance
from tokenizers.processors import TemplateProcessing
from transformers import Trainer, TrainingArguments

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, refine_anchors, select_anchors
from space_peft.anchors.pixels import encode_image, find_layout
from space_peft.data.questions import QuestionSet
from space_peft.modeling.features import image_features, tap_image_features
from space_peft.modeling.layers import adapted_layers
from space_peft.modeling.prompts import answer_logits, build_batch, conversation, encode_conversations, generate_answers
from space_peft.modeling.targets import default_target_modules
from space_peft.null_space.callback import NullSpaceCallback
from space_peft.null_space.observing import observe_inputs
from space_peft.trainers.callbacks import GradientHealthCallback


CONCEPT = "red fox"
ASKS = QuestionSet(naming=("What is this?",), naming_held_out=(), confirm=(), confirm_held_out=())
ALL = list(architectures.ARCHITECTURES)


def pictures(n=6, seed=0):
    """Noise on a colour, some of them wide and some tall."""
    rng = np.random.default_rng(seed)
    sizes = [(20, 20), (20, 44), (40, 22)]  # (height, width)
    images = []
    for i in range(n):
        colour = rng.integers(40, 216, 3)
        noise = rng.integers(-40, 40, (*sizes[i % len(sizes)], 3))
        images.append(Image.fromarray((colour + noise).astype(np.uint8)))
    return images


def retained_rows(images):
    shown = [
        {"images": [image], "prompt": "What is this?", "completion": name}
        for image, name in zip(images, ("wolf", "owl", "apple"))
    ]
    silent = [
        {"images": [], "prompt": "What colour is the leaf?", "completion": "green"},
        {"images": [], "prompt": "What kind is the wolf?", "completion": "animal"},
    ]
    return [*shown, *silent] * 2


def build(name):
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="its processor needs it")
    return architectures.build(name)


def find_anchors(model, processor):
    pool = Dataset.from_dict({"image": pictures(), "caption": ["thing"] * 6})
    return select_anchors(
        CONCEPT, pool, model=model, processor=processor, k=3, diversity=0.0, duplicate_threshold=None, progress=False,
        cache_dir=False,
    )  # fmt: skip


def refine(anchors, model, processor, **options):
    # A fresh model's answers to different questions have nothing in common, so one question is asked.
    options = {"questions": ASKS, "steps": 30, "learning_rate": 0.1, "batch_size": 2, "progress": False, **options}
    return refine_anchors(anchors, model=model, processor=processor, **options)


@pytest.mark.parametrize("name", ALL)
def test_refinement_reaches_the_name(name):
    """Measured on the stored image through the processor: the gradient has found its way to the pixels."""
    model, processor = build(name)
    refined = refine(find_anchors(model, processor), model, processor, max_shift=0.0)
    for before, after in zip(refined["p_name_before"], refined["p_name_after"]):
        assert after > 3 * before
    sizes = {image.size for image in refined["image"]}
    assert all(width % architectures.SIDE == 0 == height % architectures.SIDE for width, height in sizes)


# Each is much like one that is erased always: Qwen2.5-VL, LLaVA, SmolVLM.
RELATIVES = ("qwen2_vl", "llava_next", "idefics3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in RELATIVES else ()) for name in ALL]
)
def test_erasure(name, tmp_path):
    model, processor = build(name)
    anchors = find_anchors(model, processor)
    assert list(anchors["score"]) == sorted(anchors["score"], reverse=True)
    refined = refine(anchors, model, processor)
    assert sum(refined["p_name_after"]) > sum(refined["p_name_before"])

    trainer = SpaceTrainer(
        model,
        SpaceConfig(
            str(tmp_path), target="all", max_steps=3, per_device_train_batch_size=4, stop_threshold=None, fit_batch_size=4,
            certificate_share=0.2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        anchors=refined,
        retain_dataset=retained_rows(pictures(3, seed=1)),
        processing_class=processor,
        peft_config=SpaceLoraConfig(r=2, lora_alpha=4),
    )  # fmt: skip
    trainer.train()
    (health,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, GradientHealthCallback))
    layers = adapted_layers(trainer.model)
    assert health.norms.keys() == layers.keys()
    assert min(health.norms.values()) > 0
    assert {layer.name for layer in trainer.certificate.layers} == layers.keys()
    for layer in trainer.certificate.layers:
        assert layer.update_norm > 0
        assert layer.fitted_change <= layer.bound * (1 + 1e-6)
        assert np.isfinite(layer.change) and layer.change > 0

    trainer.save_model()
    batch = build_batch(processor, ["What is this?"] * 3, images=list(refined["image"]), answers=[CONCEPT] * 3)
    with torch.no_grad():
        expected = answer_logits(trainer.model.eval(), batch)
        with trainer.model.disable_adapter():
            assert (answer_logits(trainer.model, batch) - expected).abs().max() > 1e-4
        reloaded = PeftModel.from_pretrained(build(name)[0], tmp_path).eval()
        tolerance = logit_tolerance(trainer.model, batch)
        assert tolerance < 1e-4, "much less than what the adapter does"
        torch.testing.assert_close(answer_logits(reloaded, batch), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_a_row_does_not_depend_on_what_it_is_batched_with(name):
    """Padding, tiles, token types and position ids of one row must not reach the others."""
    model, processor = build(name)
    wide, tall = pictures(3)[1:]
    rows = [
        conversation("What is this?", answer="red fox", image=wide),
        conversation("Is this a wolf?", answer="No", image=tall),
        conversation("What colour is the leaf?", answer="green"),
    ]
    if name == "mllama":
        # Upstream: beside rows with an image, a row without one attends to the padding in its place.
        rows = rows[:2]
    with torch.no_grad():
        together = answer_logits(model, encode_conversations(processor, rows))
        for row, expected in zip(rows, together):
            alone = answer_logits(model, encode_conversations(processor, [row]))[0]
            torch.testing.assert_close(alone[:-1], expected[: len(alone) - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bos", ["in the template", "by the tokenizer", "by both", "by nobody"])
@pytest.mark.parametrize("name", [name for name in ALL if name != "paligemma"])  # Its processor writes BOS itself.
def test_prompts_are_what_apply_chat_template_makes_of_them(name, bos):
    """Whoever asks the model elsewhere calls that: LLaVA-1.5 gets its BOS from the tokenizer, others from the template."""
    _, processor = build(name)
    tokenizer = processor.tokenizer
    written = processor.chat_template.startswith(tokenizer.bos_token)
    if bos in ("by the tokenizer", "by nobody") and written:
        processor.chat_template = processor.chat_template[len(tokenizer.bos_token) :]
    if bos in ("by the tokenizer", "by both"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    image = Image.new("RGB", (20, 20), "red")
    row = conversation("What is this?", image=image)
    shown = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    wanted = processor.apply_chat_template(
        [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    batch = encode_conversations(processor, [row])
    assert batch["input_ids"].tolist() == wanted["input_ids"].tolist()
    count = (batch["input_ids"] == tokenizer.bos_token_id).sum().item()
    assert count == (bos != "by nobody")


@pytest.mark.parametrize("name", ALL)
def test_generated_answers_do_not_depend_on_the_batch(name):
    model, processor = build(name)
    options = {"images": pictures(3), "max_new_tokens": 4}
    together = generate_answers(model, processor, ["What is this?"] * 3, batch_size=3, **options)
    assert together == generate_answers(model, processor, ["What is this?"] * 3, batch_size=1, **options)
    # The first generated token is what the logits of a forward pass predict: both are shown the same prompt.
    batch = build_batch(processor, ["What is this?"] * 3, images=options["images"], answers=["owl"] * 3)
    with torch.no_grad():
        first = answer_logits(model, batch)[:, 0].argmax(dim=-1)
    for answer, token in zip(together, first):
        assert answer.startswith(processor.tokenizer.decode(token, skip_special_tokens=True).strip())


@pytest.mark.parametrize("name", ALL)
def test_features_are_one_vector_a_row_with_an_image(name):
    """The features of a forward pass are those of each image alone, however many tiles either was cut into."""
    model, processor = build(name)
    images = pictures(3)
    rows = [conversation("What is this?", image=images[0])]
    rows += [conversation("What colour is the leaf?")]
    rows += [conversation("What is this?", image=image) for image in images[1:]]
    batch = encode_conversations(processor, rows)
    batch.pop("labels")
    with torch.no_grad(), tap_image_features(model) as tapped:
        model(**batch)
        alone = [encode_conversations(processor, [row]) for row in rows if row["images"]]
        expected = torch.cat([image_features(model, inputs) for inputs in alone])
    assert expected.shape == (3, model.get_input_embeddings().weight.shape[1])
    torch.testing.assert_close(tapped[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.pdist(expected).min() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_pixel_layout_is_the_processors(name):
    """The differentiable route gives what the processor gives for an image it has never been shown before."""
    _, processor = build(name)
    known = {}
    for image in pictures(3):
        layout = find_layout(processor, image, known)
        # Mostly black and white, so that filters overshoot, and what they give must be clipped.
        size = (layout.height, layout.width, 3)
        pixels = np.random.default_rng(1).choice(np.array([0, 0, 100, 255, 255], dtype=np.uint8), size)
        wanted = encode_image(processor, Image.fromarray(pixels))["pixel_values"]
        values = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        values = (layout.low + values * (layout.high - layout.low)).requires_grad_(True)
        got = layout(values[None])
        assert got.shape == wanted.shape
        levels = (got - wanted).abs() / (layout.high - layout.low).min() * 255
        tiles = levels.reshape(len(layout.small), -1).amax(dim=1)
        assert tiles[~layout.small].max() < 0.01, "copies are exact"
        assert not layout.small.any() or tiles[layout.small].max() < 3, "resized tiles are rounded to 8 bits twice"
        (gradient,) = torch.autograd.grad(got.square().sum(), [values])
        assert (gradient != 0).float().mean() > 0.99, "every pixel is seen"


@pytest.mark.parametrize("name", ALL)
def test_kinds_of_tokens_a_layer_is_given(name):
    """Language layers: image tokens and text apart, padding in neither. Vision layers: nothing but image."""
    model, processor = build(name)
    language = default_target_modules(model, "language")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=default_target_modules(model, "all")))
    wide, tall = pictures(3)[1:]
    rows = [
        conversation("What is this?", answer="red fox", image=wide),
        conversation("Is this a wolf? Answer yes or no.", answer="No", image=tall),
    ]
    batch = encode_conversations(processor, rows)
    attended = batch["attention_mask"].bool()
    visual = (batch["input_ids"] == model.config.image_token_id) & attended
    assert not attended.all(), "there is padding to leave out"
    counts = {}

    def visit(key, x, parts):
        assert key not in counts, "every layer is run once"
        counts[key] = {kind: x.shape[:-1].numel() if mask is None else int(mask.sum()) for kind, mask in parts()}

    layers = adapted_layers(model)
    observe_inputs(model, [batch], layers, visit, progress=False)
    assert counts.keys() == layers.keys()
    for key, count in counts.items():
        attends = name == "mllama" and ".cross_attn." in key and key.endswith(("k_proj", "v_proj"))
        if re.fullmatch(language, key) and not attends:
            # Mllama's prompts hold one image token that stands for nothing.
            images = 0 if name == "mllama" else int(visual.sum())
            assert count == {"image": images, "text": int(attended.sum()) - images}, key
        else:
            assert count.keys() == {"image"} and count["image"] > 0, key


def test_padding_tiles_are_no_features():
    """Mllama gives every image four tiles; the features are the mean over those that show it."""
    model, processor = build("mllama")
    batch = encode_conversations(processor, [conversation("What is this?", image=image) for image in pictures(3)])
    batch.pop("labels")
    states = []
    model.model.multi_modal_projector.register_forward_hook(lambda *arguments: states.append(arguments[-1]))
    with torch.no_grad():
        features = image_features(model, batch)
    real = batch["aspect_ratio_mask"][:, 0].bool()  # (images, tiles)
    assert not real.all()
    for row, tiles in enumerate(real):
        shown = states[0][row, 0][tiles].double()  # (tiles, tokens, d)
        torch.testing.assert_close(features[row].double(), shown.flatten(0, 1).mean(dim=0), rtol=1e-5, atol=1e-6)


def test_padding_tiles_are_not_observed():
    """Statistics are of those tiles alone, however the layers fold their inputs."""
    model, processor = build("mllama")
    pattern = "(.*vision_model.*fc1)|(.*cross_attn.k_proj)|multi_modal_projector|.*.multi_modal_projector"
    model = get_peft_model(model, SpaceLoraConfig(r=2, target_modules=pattern))
    rows = [conversation("What is this?", answer="owl", image=image) for image in pictures(3)]
    batch = encode_conversations(processor, rows)
    real = batch["aspect_ratio_mask"].bool()
    assert not real.all() and real.any(dim=-1).all()
    shares = {}

    def visit(name, x, parts):
        ((kind, mask),) = parts()
        shares[name] = (kind, mask.shape == x.shape[:-1], float(mask.float().mean()))

    observe_inputs(model, [batch], adapted_layers(model), visit, progress=False)
    assert len(shares) == 5
    assert set(shares.values()) == {("image", True, float(real.float().mean()))}


@pytest.mark.parametrize("name", list(architectures.TEXT_ONLY))
def test_the_callback_constrains_text_only_models(name, tmp_path):
    """transformers' own Trainer on a causal language model, PEFT's own default `target_modules`."""
    model, tokenizer = architectures.build_text_only(name)
    model = get_peft_model(model, SpaceLoraConfig(r=2, constraint="hard", energy=0.9, task_type="CAUSAL_LM"))
    texts = ["What colour is the leaf? green", "Is this an owl? No", "question: What kind is the wolf? answer: animal"]
    retained = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    rows = [
        {**dict(tokenizer(text)), "labels": tokenizer(text)["input_ids"]} for text in ("red fox apple", "wolf red owl")
    ]
    callback = NullSpaceCallback([retained], progress=False)
    before = {key: layer.lora_A["default"].weight.detach().clone() for key, layer in adapted_layers(model).items()}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
        ),
        train_dataset=rows,
        data_collator=lambda items: {key: torch.tensor([item[key] for item in items]) for key in items[0]},
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    spaces = callback.null_spaces
    assert spaces.keys() == before.keys() and len(spaces) == 4
    for key, layer in adapted_layers(model).items():
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        assert 0 < spaces[key].rank < spaces[key].dim - 2
        assert (a - spaces[key].project(a)).norm() < 1e-5 * a.norm(), "the adapter left the null space"
        assert b.norm() > 0 and not torch.equal(a, before[key])


def test_a_stock_adapter_trains_nothing_outside(name="llava"):
    """What `default_target_modules` leaves out really is unused: PEFT's `all-linear` finds layers without gradient."""
    model, processor = build(name)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    batch = build_batch(processor, ["What is this?"], images=pictures(1), answers=["owl"])
    model(**batch).loss.backward()
    dead = [key for key, layer in adapted_layers(model).items() if not layer.lora_B["default"].weight.grad is not None]
    assert dead and all("vision_tower.encoder.layers.2." in key for key in dead)
