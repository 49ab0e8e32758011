"""The canary: answers that say whether a loaded model is the one that was trained."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image

from space_peft import QuestionSet, SpaceLoraConfig
from space_peft.canary.check import MIN_MARGIN, Canary, _best, check_canary, make_canary
from space_peft.canary.items import Answer, CanaryItem
from space_peft.data.name_forms import surface_forms
from space_peft.data.seed_images import pixel_hash, seed_image
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.modeling.fingerprint import _spread, compare_base, fingerprint_base
from space_peft.modeling.layers import adapted_layers
from space_peft.modeling.prompts import generate_answers
from space_peft.records.folder import CANARY_NAME


# Seed, width, height: pixels of the released recipe, which must never change.
RECIPE_V1 = {
    (0, 64, 64): "51b46f2cd0f082a31e6181331478cb02598ca2e019dfd6edcd7e81bc90200df8",
    (12345, 97, 31): "47d7c18906852a34985053f4bfd5f6c453700422bcdcb44f8d97cd4fff906729",
}


def adapted(scale=0.0, seed=0):
    """The embedded model with an adapter whose B is random."""
    model, processor = load_demo_model()
    torch.manual_seed(seed)
    model = get_peft_model(model, SpaceLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=scale)
    return model.eval(), processor


@pytest.fixture(scope="module")
def erased():
    """A model with an adapter that changes answers, its processor and its canary."""
    model, processor = adapted(0.02)
    canary = make_canary(model, processor, questions=DEMO_QUESTIONS, names=["fox"])
    return model, processor, canary


@pytest.mark.parametrize("case", RECIPE_V1)
def test_recipe_is_the_released_one(case):
    assert pixel_hash(seed_image(*case)) == RECIPE_V1[case]


def test_images_differ_by_seed_and_are_no_noise():
    arrays = [np.asarray(seed_image(seed, 64, 48), dtype=float) for seed in range(20)]
    assert all(array.shape == (48, 64, 3) for array in arrays)
    assert len({array.tobytes() for array in arrays}) == 20
    # Neighbouring pixels are alike, as in pictures; in noise the mean difference is 85.
    assert max(np.abs(np.diff(array, axis=1)).mean() for array in arrays) < 15
    assert min(array.std() for array in arrays) > 25


def test_pixel_hash_is_of_pixels_and_size(tmp_path):
    image = seed_image(1, 6, 4)
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert pixel_hash(stored) == pixel_hash(image)
    assert pixel_hash(Image.frombytes("RGB", (4, 6), image.tobytes())) != pixel_hash(image)


def test_answers_are_those_of_generate_and_margins_are_kept(erased):
    model, processor, canary = erased
    assert len(canary.items) == 4
    for item in canary.items:
        image = [seed_image(item.seed, item.width, item.height)]
        assert generate_answers(model, processor, [item.question], images=image) == [item.erased.text]
        with model.disable_adapter():
            assert generate_answers(model, processor, [item.question], images=image) == [item.deployed.text]
        for answer in (item.deployed, item.erased):
            assert answer.margin >= MIN_MARGIN and answer.log_prob < 0 and answer.text
            assert processor.decode(answer.tokens, skip_special_tokens=True).strip() == answer.text


def test_log_probability_is_that_of_a_forward_pass(erased):
    from space_peft.modeling.prompts import build_batch

    model, processor, canary = erased
    item = canary.items[0]
    batch = build_batch(processor, [item.question], images=[seed_image(item.seed, item.width, item.height)])
    tokens = torch.tensor([item.erased.tokens])
    batch["input_ids"] = torch.cat([batch["input_ids"], tokens], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch.pop("labels"), batch.pop("token_type_ids", None)
    with torch.no_grad():
        log_probs = model(**batch).logits[0, -tokens.shape[1] - 1 : -1].double().log_softmax(-1)
    assert log_probs.gather(-1, tokens[0, :, None]).sum().item() == pytest.approx(item.erased.log_prob, abs=1e-4)
    top = log_probs.topk(2, dim=-1).values
    assert (top[:, 0] - top[:, 1]).min().item() == pytest.approx(item.erased.margin, abs=1e-3)


def test_same_model_passes_and_making_it_again_gives_the_same(erased):
    model, processor, canary = erased
    result = check_canary(model, processor, canary)
    assert result.ok and result.acts and not result.base and result.base_compared >= 10
    assert result.max_log_prob_change < 0.1 * result.rounding, "batches of other sizes sum in another order"
    again = make_canary(model, processor, questions=DEMO_QUESTIONS, names=["fox"])
    assert [(item.seed, item.deployed.tokens, item.erased.tokens) for item in again.items] == [
        (item.seed, item.deployed.tokens, item.erased.tokens) for item in canary.items
    ]


def item_of(deployed, erased, log_prob_change=0.0, margin=2.0):
    """An item about nothing: only its answers count."""
    first = Answer(deployed, (len(deployed), 2), -1.0, margin)
    second = Answer(erased, (len(erased), 2), -1.0 - log_prob_change, margin)
    return CanaryItem("seed", "what is this?", 1, 1, "", first, second, seed=0)


def test_what_shows_the_adapter_comes_first_then_the_surest():
    """Beyond twice what rounding needs, a log-probability shows no more; nothing within it can be close to both."""
    turned, far = item_of("a", "abc", margin=1.5), item_of("a", "a", log_prob_change=9.0, margin=1.1)
    clear = item_of("a", "a", log_prob_change=-0.5, margin=3.0)
    little, sure = item_of("a", "a", log_prob_change=0.21), item_of("a", "a", log_prob_change=0.19, margin=9.0)
    assert _best([sure, little, far, clear, turned], rounding=0.1) == [turned, clear, far, little, sure]
    shown = [item.shows_adapter(0.1) for item in (turned, clear, far, little, sure)]
    assert shown == [True, True, True, True, False]


def test_an_item_without_the_name_shows_the_adapter(erased):
    """An adapter that changes little is shown by what may be published; more images are tried until one shows it."""
    processor = erased[1]
    model, _ = adapted(0.01)
    canary = make_canary(model, processor, questions=DEMO_QUESTIONS, names=["fox"]).publishable(names=["fox"])
    assert any(item.shows_adapter(0.02) for item in canary.items)
    assert not any(item.tells_apart for item in canary.items), "else the test shows nothing"
    result = check_canary(model, processor, canary)
    assert result.ok and result.telling and result.seen == pytest.approx(0.02)
    idle = check_canary(adapted(0.0)[0], processor, canary)
    assert idle.max_log_prob_change > idle.seen, "the base model alone does not pass for it"


def test_more_images_are_tried_until_one_shows_the_adapter(monkeypatch):
    asked = []

    def answer(model, processor, items):
        asked.append([item.seed for item in items])
        change = 0.5 if len(asked) == shown_in else 0.0
        return [dataclasses.replace(item, **vars_of(item_of("a", "a", change))) for item in items]

    def vars_of(item):
        return {"deployed": item.deployed, "erased": item.erased}

    monkeypatch.setattr("space_peft.canary.check._answer", answer)
    model, processor = load_demo_model()
    for shown_in, rounds in ((1, 1), (2, 2), (9, 4)):
        asked.clear()
        canary = make_canary(model, processor, questions=DEMO_QUESTIONS, names=["fox"], seeds=2, seed=3)
        tried = [seeds for seeds in asked if seeds]
        assert [seed for seeds in tried for seed in seeds] == list(range(48, 48 + 16 * rounds))
        assert len(canary.items) == 2 and canary.items[0].shows_adapter(0.02) == (shown_in < 9)


def test_training_mode_and_adapter_are_left_as_they_were(erased):
    model, processor, canary = erased
    model.train()
    try:
        check_canary(model, processor, canary)
        assert model.training
        assert not any(layer.disable_adapters for layer in adapted_layers(model).values())
    finally:
        model.eval()


def test_precision_does_not_turn_answers(erased):
    _, processor, canary = erased
    model, _ = adapted(0.02)
    result = check_canary(model.to(torch.bfloat16), processor, canary)
    assert result.ok and not result.base, (result.deployed, result.erased, result.base)
    assert 0 < result.max_log_prob_change < 0.2


def test_another_adapter_is_found(erased):
    _, processor, canary = erased
    other, _ = adapted(0.3, seed=1)
    result = check_canary(other, processor, canary)
    assert not result.ok and result.erased and not result.deployed and not result.base


def test_an_adapter_without_effect_is_found(erased):
    _, processor, canary = erased
    model, _ = adapted(0.0)
    result = check_canary(model, processor, canary)
    assert not result.acts and not result.ok


def test_another_base_is_found_by_its_weights(erased):
    model, processor, canary = erased
    other, _ = adapted(0.02)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" not in name:
                parameter.mul_(1 + 1e-5)
    result = check_canary(other, processor, canary)
    # A bias of nothing but zeros stays as it is.
    assert result.base_compared - 1 <= len(result.base) <= result.base_compared > 8
    assert result.ok, "a change this small turns no answer; the fingerprint alone sees it"


def test_fingerprint_does_not_depend_on_the_adapter_and_survives_rounding():
    base, _ = load_demo_model()
    recorded = fingerprint_base(base)
    assert recorded.dtype == "float32" and 10 <= len(recorded.exact) <= 32
    model, _ = adapted(0.02)
    assert fingerprint_base(model) == recorded
    half, _ = load_demo_model()
    assert compare_base(half.to(torch.bfloat16), recorded) == ([], len(recorded.exact))
    # Recorded in bfloat16, loaded in float32: the rounded values are compared.
    in_half = fingerprint_base(half)
    assert in_half.dtype == "bfloat16" and compare_base(base, in_half) == ([], len(recorded.exact))


def test_anchors_become_items_when_the_name_is_forgotten(demo_erasure_data):
    anchors, _ = demo_erasure_data
    model, processor = adapted(0.0)
    # A bias from the name's forms to another name, without training, is an erasure whose answers are sure.
    head = model.get_base_model().get_output_embeddings()
    fox = sorted({form[0] for form in surface_forms("fox", processor.tokenizer)})
    wolf = processor.tokenizer.convert_tokens_to_ids("wolf")

    def forget(module, inputs, logits):
        if not next(iter(adapted_layers(model).values())).disable_adapters:
            logits[..., wolf] = torch.maximum(logits[..., wolf], logits[..., fox].amax(dim=-1))
            logits[..., fox] -= 30.0
        return logits

    head.register_forward_hook(forget)
    canary = make_canary(model, processor, questions=DEMO_QUESTIONS, names=["fox"], anchors=anchors, images=3)
    pictures = [item for item in canary.items if item.kind == "image"]
    assert 1 <= len(pictures) <= 3
    for item in pictures:
        assert "fox" in item.deployed.text and "fox" not in item.erased.text and item.tells_apart
    assert canary.publishable(images=False).items == tuple(item for item in canary.items if item.kind == "seed")
    assert not any("fox" in text for item in canary.publishable(names=["fox"]).items for text in item.texts())
    assert check_canary(model, processor, canary).ok


def test_questions_never_mention_the_concept(erased):
    model, processor, _ = erased
    questions = QuestionSet(("is this thing a fox?", "what is this?"), (), (), ())
    canary = make_canary(model, processor, questions=questions, names=["fox"])
    assert {item.question for item in canary.items} == {"what is this?"}
    with pytest.raises(ValueError, match="every naming question mentions 'fox'"):
        make_canary(model, processor, questions=QuestionSet(("what fox is this?",), (), (), ()), names=["fox"])


def with_pictures(canary):
    """The canary with one more item, whose picture is a file."""
    first = canary.items[0]
    image = seed_image(first.seed, first.width, first.height)
    return dataclasses.replace(
        canary, items=(*canary.items, dataclasses.replace(first, kind="image", seed=None, image=image))
    )


def test_saved_canary_is_read_back_and_replaces_the_old_one(erased, tmp_path):
    model, processor, canary = erased
    more = with_pictures(canary)
    more.save(tmp_path)
    assert [path.name for path in (tmp_path / "canary").iterdir()] == ["0.png"]
    loaded = Canary.load(tmp_path)
    assert loaded.base == canary.base and loaded.items[:-1] == canary.items
    assert loaded.items[-1] == dataclasses.replace(more.items[-1], file="canary/0.png")
    assert check_canary(model, processor, loaded).ok
    canary.save(tmp_path)
    assert Canary.load(tmp_path) == canary and not (tmp_path / "canary").exists()


def test_a_changed_picture_is_damaged_and_not_asked(erased, tmp_path):
    model, processor, canary = erased
    with_pictures(canary).save(tmp_path)
    with Image.open(tmp_path / "canary" / "0.png") as image:
        image.putpixel((3, 3), (1, 2, 3))
        image.save(tmp_path / "canary" / "0.png")
    result = check_canary(model, processor, Canary.load(tmp_path))
    assert not result.ok and len(result.damaged) == 1 and "canary/0.png" in result.damaged[0]
    assert not result.erased and not result.deployed


@pytest.mark.slow  # hub/test_trainer_push.py trains and pushes one
def test_the_trainer_makes_one_and_saves_it(demo_erasure_data, tmp_path):
    from space_peft import SpaceConfig, SpaceTrainer

    anchors, retained = demo_erasure_data
    for items in (2, 0):
        model, processor = load_demo_model()
        options = {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
        config = SpaceConfig(str(tmp_path / str(items)), canary_items=items, disable_tqdm=True, use_cpu=True, **options)
        peft_config = SpaceLoraConfig(r=4, lora_alpha=8)
        trainer = SpaceTrainer(
            model,
            config,
            anchors=anchors,
            retain_dataset=retained,
            processing_class=processor,
            questions=DEMO_QUESTIONS,
            peft_config=peft_config,
        )
        trainer.train()
        trainer.save_model()
        if items == 0:
            assert trainer.canary is None and not (tmp_path / "0" / CANARY_NAME).exists()
            continue
        canary = Canary.load(tmp_path / "2")
        assert 1 <= sum(item.kind == "seed" for item in canary.items) <= 2
        assert sum(item.kind == "image" for item in canary.items) <= 2
        assert check_canary(trainer.model, processor, canary).ok
    for bad in (-1, 33):
        with pytest.raises(ValueError, match="`canary_items` must be in"):
            SpaceConfig(str(tmp_path), canary_items=bad)


def change(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "space_peft.canary.v2", "expected format"),
        (["recipe"], "another", "does not know"),
        (["items"], [{}] * 65, "at most 64"),
        (["items", 0], [], "an item must be an object"),
        (["items", 0, "extra"], 1, "an item must be an object"),
        (["items", 0, "question"], "x" * 2001, "`question`"),
        (["items", 0, "width"], 10**9, "`width`"),
        (["items", 0, "height"], True, "`height`"),
        (["items", 0, "seed"], -1, "`seed` in"),
        (["items", 0, "seed"], 1.5, "`seed` in"),
        (["items", 0, "file"], "canary/0.png", "no `file`"),
        (["items", 0, "kind"], "script", "must be of kind"),
        (["items", 0, "deployed"], "fox", "an answer must be an object"),
        (["items", 0, "deployed", "tokens"], list(range(9)), "`tokens`"),
        (["items", 0, "deployed", "tokens"], [1.5], "`tokens`"),
        (["items", 0, "erased", "log_prob"], "0", "`log_prob`"),
        (["items", 0, "erased", "text"], None, "`text`"),
        (["items", -1, "file"], "../../secret.png", "'..'"),
        (["items", -1, "file"], "/etc/hostname", "absolute"),
        (["items", -1, "file"], "canary/missing.png", "cannot be read"),
        (["items", -1, "width"], 63, "64 x 64 pixels, not 63 x 64"),
        (["base"], None, "fingerprint"),
        (["base", "exact"], ["a"], "`exact`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hostile_canaries_are_refused_with_the_file(erased, tmp_path, path, value, message):
    with_pictures(erased[2]).save(tmp_path)
    content = json.loads((tmp_path / CANARY_NAME).read_text())
    change(content, path, value)
    (tmp_path / CANARY_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        Canary.load(tmp_path)
    assert CANARY_NAME in str(raised.value)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_damaged_json_is_a_value_error(tmp_path_factory, erased, data):
    """Whatever single value of the file is replaced by whatever JSON can hold, nothing but ValueError comes of it."""
    folder = tmp_path_factory.mktemp("canary")
    erased[2].save(folder)
    content = json.loads((folder / CANARY_NAME).read_text())
    place = content
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({}))
    (folder / CANARY_NAME).write_text(json.dumps(content))
    try:
        assert isinstance(Canary.load(folder), Canary)
    except ValueError as error:
        assert CANARY_NAME in str(error)


def test_of_every_kind_of_weight_some_are_looked_at():
    layers = ("self_attn.q_proj.weight", "self_attn.v_proj.bias", "mlp.up_proj.weight", "input_layernorm.weight")
    names = [f"language_model.layers.{i}.{name}" for i in range(28) for name in layers]
    names += [f"visual.blocks.{i}.attn.qkv.weight" for i in range(32)] + ["lm_head.weight"]
    found = _spread(names)
    for name in (*layers, "attn.qkv.weight", "lm_head.weight"):
        own = [part for part in found if part.endswith(name)]
        # An adapter that was merged changes matrices, of a few layers perhaps, and no bias.
        assert len(own) >= min(4, sum(part.endswith(name) for part in names)), name
    assert len(found) == 32 and found == _spread(names[::-1])
