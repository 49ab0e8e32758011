"""The comparison methods on the embedded model: each forgets the images it is given, keeps the rest, and says so."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from space_peft import SpaceLoraConfig
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.probes import demo_retain_rows, demo_split
from space_peft.losses import answer_labels, keep_loss
from space_peft.modeling.features import image_features
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.modeling.prompts import answer_logits, encode_conversations
from space_peft.trainers import (
    CVFConfig,
    CVFTrainer,
    GradDiffConfig,
    GradDiffTrainer,
    MMUnlearnerConfig,
    MMUnlearnerTrainer,
    NPOConfig,
    NPOTrainer,
)


CONCEPT = "fox"


@pytest.fixture(scope="module")
def concept_images(demo_images):
    return demo_images.select([row for row, name in enumerate(demo_images["name"]) if name == CONCEPT])


@pytest.fixture(scope="module")
def retain(demo_images):
    return demo_retain_rows(CONCEPT, demo_split(demo_images, CONCEPT)[0], seed=0)[:120]


@pytest.fixture
def make(concept_images, retain, tmp_path):
    def make(trainer, config, *, peft_config=None, forget=None, rows=None, model=None, **options):
        arguments = {
            "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "canary_items": 0, "own_answers": False,
        }  # fmt: skip
        arguments |= {key: options.pop(key) for key in list(options) if key in config.__dataclass_fields__}
        model, processor = model or load_demo_model()
        return trainer(
            model,
            config(output_dir=str(tmp_path / "out"), **arguments),
            forget_dataset=concept_images if forget is None else forget,
            retain_dataset=retain if rows is None else rows,
            processing_class=processor,
            questions=DEMO_QUESTIONS,
            peft_config=peft_config or LoraConfig(r=8, lora_alpha=16),
            **options,
        )

    return make


METHODS = {
    "GA": (GradDiffTrainer, GradDiffConfig, {"retain_loss": "none"}),
    "GradDiff": (GradDiffTrainer, GradDiffConfig, {"retain_loss": "nll"}),
    "KL": (GradDiffTrainer, GradDiffConfig, {"retain_loss": "kl"}),
    "NPO": (NPOTrainer, NPOConfig, {}),
    "MMUnlearner": (MMUnlearnerTrainer, MMUnlearnerConfig, {"forget_every": 2}),
    "CVF": (CVFTrainer, CVFConfig, {"learning_rate": 5e-3}),
}


# The constraint is for all the same; a plain LoRA always for one method with retained rows and for one without.
PLAIN = ("GradDiff",)


@pytest.mark.parametrize(
    "method, constrained",
    # KL, GA and GradDiff are one trainer, which the plain LoRA tries quickly.
    [
        pytest.param(method, True, marks=pytest.mark.slow if method in ("KL", "GA", "GradDiff") else ())
        for method in METHODS
    ]
    + [pytest.param(method, False, marks=() if method in PLAIN else pytest.mark.slow) for method in METHODS],
)
def test_forgets_and_keeps(make, method, constrained):
    trainer, config, options = METHODS[method]
    peft_config = LoraConfig(r=8, lora_alpha=16)
    if constrained:
        options = {"learning_rate": 5e-3, **options}  # the projection shortens every update
        peft_config = SpaceLoraConfig(r=8, lora_alpha=16, strength=1.0)
    trainer = make(trainer, config, peft_config=peft_config, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_p_name_on_images"] > 0.9 and before["eval_keep_agreement"] == 1.0
    assert after["eval_p_name_on_images"] < 0.5 * before["eval_p_name_on_images"]
    assert after["eval_keep_agreement"] > 0.8
    assert bool(trainer.null_spaces) == constrained and (trainer.certificate is not None) == constrained
    assert any("loss_forget" in entry and "p_name_on_images" in entry for entry in trainer.state.log_history)


def first_batch(trainer):
    return trainer.data_collator([trainer.train_dataset[item] for item in range(trainer.args.train_batch_size)])


def own_loss(trainer, batch):
    """What the model itself, given `labels`, calls its loss."""
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(**batch).loss.item()


@pytest.mark.parametrize("retain_loss, sign", [("none", 0.0), ("nll", 1.0)])
def test_grad_diff_is_the_difference_of_the_models_own_losses(make, retain_loss, sign):
    trainer = make(GradDiffTrainer, GradDiffConfig, retain_loss=retain_loss, retain_weight=0.5, forget_weight=2.0)
    batch = first_batch(trainer)
    assert ("retain" in batch) == (retain_loss != "none")  # What no loss looks at is not run.
    expected = -2.0 * own_loss(trainer, batch["forget"])
    if sign:
        expected = expected + sign * 0.5 * own_loss(trainer, batch["retain"])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)


def shake(trainer):
    """An adapter that does something, so that a comparison with the deployed model is not 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted_layers(trainer.model).values():
            b = lora_weights(layer)[1]
            b.copy_(0.2 * torch.randn(b.shape, generator=generator))


def test_kl_minimisation_compares_with_the_adapter_off(make):
    trainer = make(GradDiffTrainer, GradDiffConfig, retain_loss="kl")
    shake(trainer)
    batch = first_batch(trainer)
    with torch.no_grad():
        adapted = answer_logits(trainer.model, batch["retain"]).double()
        with trainer.model.disable_adapter():
            base = answer_logits(trainer.model, batch["retain"]).double()
    kl = keep_loss(adapted, base, answer_labels(batch["retain"]["labels"])).item()
    assert kl > 1e-3
    expected = kl - own_loss(trainer, batch["forget"])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_npo_compares_whole_answers_with_the_adapter_off(make):
    trainer = make(NPOTrainer, NPOConfig, retain_loss="none", beta=0.7)
    shake(trainer)
    batch = first_batch(trainer)
    labels = batch["forget"]["labels"]
    inputs = {key: value for key, value in batch["forget"].items() if key != "labels"}

    def answer_log_probs():
        log_probs = trainer.model(**inputs).logits.double().log_softmax(dim=-1)[:, :-1]
        picked = log_probs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return (picked * (labels[:, 1:] != -100)).sum(dim=1)

    trainer.model.eval()
    with torch.no_grad():
        adapted = answer_log_probs()
        with trainer.model.disable_adapter():
            reference = answer_log_probs()
    assert (adapted - reference).abs().max() > 0.01
    expected = (2 / 0.7 * torch.log(1 + (adapted.exp() / reference.exp()) ** 0.7)).mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_npo_is_cached_or_computed_alike(make):
    """Rows' deployed answers are kept from a pass before training; the first step compares the model with itself."""
    trainer = make(NPOTrainer, NPOConfig, max_steps=1)
    trainer.train()
    assert trainer.deployed_answers is not None
    first = next(entry for entry in trainer.state.log_history if "loss_forget" in entry)
    assert first["loss_forget"] == pytest.approx(2 / 0.4 * 0.6931, rel=1e-3)


# CVF


@pytest.mark.parametrize("kept", [False, True], ids=["of the deployed model", "of the keep_model"])
def test_cvf_is_contrast_plus_relative_distance(make, kept):
    original = load_demo_model()[0] if kept else None
    if kept:
        with torch.no_grad():
            original.model.multi_modal_projector.linear_1.weight.mul_(1.3)
    trainer = make(CVFTrainer, CVFConfig, temperature=0.3, feature_weight=3.0, forget_weight=0.5, keep_model=original)
    trainer._look()
    shake(trainer)
    model, data = trainer.model.eval(), trainer.train_dataset
    batch = first_batch(trainer)
    with torch.no_grad():
        moved, held = (image_features(model, batch[kind]).double() for kind in ("forget", "retain"))
        with model.disable_adapter():
            holds = original if kept else model
            origin = image_features(model, batch["forget"]).double()
            before = image_features(holds, batch["retain"]).double()
            rows = [row for row in (data.retained[index] for index in data.indices) if row["images"]]
            known = image_features(holds, encode_conversations(trainer.processing_class, rows)).double()

    def cosines(a, b):
        return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T

    pull = (cosines(moved, known.mean(dim=0, keepdim=True)) / 0.3).exp()[:, 0]
    push = (cosines(moved, origin) / 0.3).exp().sum(dim=1)
    contrast = -(pull / (pull + push)).log().mean()
    distance = ((held - before) ** 2).mean() / (known**2).mean()
    assert contrast > 0.1 and distance > 0.01
    expected = 0.5 * contrast + 3.0 * distance
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_cvf_leaves_the_language_model_alone(make):
    trainer = make(CVFTrainer, CVFConfig, max_steps=2)
    frozen = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    trainer.train()
    assert not [name for name in adapted_layers(trainer.model) if "language_model" in name]
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    with pytest.raises(ValueError, match="language model are adapted.*language_model"):
        make(CVFTrainer, CVFConfig, peft_config=LoraConfig(r=4, target_modules=r".*language_model.*q_proj"))


def test_cvf_moves_features_of_the_concept_and_holds_those_of_others(make, concept_images, demo_images):
    from space_peft.anchors.encoders import OwnSpaceEncoder

    trainer = make(CVFTrainer, CVFConfig, max_steps=15, learning_rate=5e-3)
    encoder = OwnSpaceEncoder(trainer.model, trainer.processing_class)
    others = [row["image"] for row in demo_images.select(range(0, 200, 10)) if row["name"] != CONCEPT]
    before = [encoder.embed_images(list(images)) for images in (concept_images["image"], others)]
    trainer.train()
    after = [encoder.embed_images(list(images)) for images in (concept_images["image"], others)]
    concept, other = ((a * b).sum(dim=1).mean().item() for a, b in zip(before, after, strict=True))
    assert concept < 0.6 < 0.9 < other


@pytest.mark.slow
def test_cvf_follows_a_reference_model(make):
    """Here one whose projector is turned off but for its bias: all images have the same features there."""
    reference, _ = load_demo_model()
    layer = reference.model.multi_modal_projector.linear_2
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.normal_(generator=torch.Generator().manual_seed(0))
    trainer = make(CVFTrainer, CVFConfig, max_steps=15, learning_rate=5e-3, reference_model=reference)
    trainer.train()
    batch = first_batch(trainer)
    with torch.no_grad():
        moved = image_features(trainer.model.eval(), batch["forget"])
        with trainer.model.disable_adapter():
            origin = image_features(trainer.model, batch["forget"])
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(moved, layer.bias.detach()[None]).mean() > cosine(origin, layer.bias.detach()[None]).mean() + 0.3


# What the base does for all


@pytest.mark.parametrize("method", ["GradDiff", pytest.param("MMUnlearner", marks=pytest.mark.slow)])
def test_saved_adapter_is_stock_and_says_what_was_erased(make, method, tmp_path):
    trainer, config, options = METHODS[method]
    trainer = make(trainer, config, **{**options, "max_steps": 3, "own_answers": True})
    trainer.train()
    trainer.save_model()
    base, _ = load_demo_model()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    batch = first_batch(trainer)["forget"]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)
    said = json.loads((tmp_path / "out" / "space_anchors.json").read_text())
    given, found = len(trainer.forget.given), len(trainer.train_dataset.rows)
    assert said == {"concept": CONCEPT, "aliases": [], "forget_rows": given} and given == 4 * 5 < found


def test_conversations_are_taken_as_they_are(make, concept_images):
    rows = [
        {
            "messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a fox"}],
            "images": [image],
        }
        for image in concept_images["image"]
    ]
    trainer = make(GradDiffTrainer, GradDiffConfig, forget=rows, concept=CONCEPT, max_steps=1)
    assert len(trainer.train_dataset.rows) == len(rows) == len(trainer.train_dataset.images)
    row = trainer.train_dataset.rows[0]
    assert trainer.processing_class.tokenizer.decode(row["answer_tokens"]) == "a fox" and row["mention"] == (0, 2)
    trainer.train()


@pytest.mark.slow  # as of SpaceTrainer, whose base class does it
def test_resume_is_bit_identical(make, tmp_path):
    options = {"forget_every": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    peft_config = SpaceLoraConfig(r=4, lora_alpha=8, strength=1.0)
    whole = make(MMUnlearnerTrainer, MMUnlearnerConfig, peft_config=peft_config, **options)
    whole.train()
    whole.save_model(tmp_path / "whole")
    resumed = make(MMUnlearnerTrainer, MMUnlearnerConfig, peft_config=peft_config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed.save_model(tmp_path / "resumed")
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(a[key], b[key]) for key in a)


# Bad input


def test_bad_input_is_refused(make, concept_images, retain):
    text_only = [{"prompt": "what is a fox?", "completion": "an animal"}]
    for options, message in [
        ({"forget": []}, "needs images of the concept"),
        ({"forget": text_only, "concept": CONCEPT}, "row 0 of `forget_dataset` has no image"),
        ({"forget": [{"picture": 1}], "concept": CONCEPT}, "expected an `image`"),
        ({"forget": concept_images.remove_columns("name")}, "name is empty"),
        ({"forget": Dataset.from_dict({"name": ["fox", "wolf"], "image": [None, None]})}, "name is empty"),
        ({"rows": []}, "retained dataset is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(GradDiffTrainer, GradDiffConfig, **options)
    for trainer in (GradDiffTrainer, NPOTrainer, MMUnlearnerTrainer, CVFTrainer):
        with pytest.raises(TypeError, match="required keyword-only argument: 'forget_dataset'"):
            trainer(None, None, retain_dataset=retain)
    words = [row for row in retain if not row["images"]]
    for trainer, config in ((CVFTrainer, CVFConfig), (MMUnlearnerTrainer, MMUnlearnerConfig)):
        with pytest.raises(ValueError, match="no retained row has an image"):
            make(trainer, config, rows=words).train()


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (GradDiffConfig, {"retain_loss": "mse"}, "one of 'none', 'nll', 'kl', got 'mse'"),
        (CVFConfig, {"retain_loss": "mse"}, "one of 'none', 'nll', 'kl', got 'mse'"),
        (GradDiffConfig, {"retain_weight": -1.0}, "retain_weight"),
        (GradDiffConfig, {"forget_weight": 0.0}, "forget_weight"),
        (NPOConfig, {"beta": 0.0}, "GradDiffTrainer"),
        (MMUnlearnerConfig, {"saliency_threshold": 0.0}, "saliency_threshold"),
        (MMUnlearnerConfig, {"forget_every": 0}, "forget_every"),
        (MMUnlearnerConfig, {"retain_loss": "none"}, "forget_every=1"),
        (CVFConfig, {"temperature": 0.0}, "temperature"),
        (CVFConfig, {"feature_weight": -1.0}, "feature_weight"),
        (CVFConfig, {"target": "all"}, "stays frozen"),
    ],
)
def test_bad_arguments_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(output_dir="unused", **arguments)


@pytest.mark.parametrize("config", [GradDiffConfig, NPOConfig, MMUnlearnerConfig, CVFConfig])
def test_a_parser_offers_what_there_is_to_choose(config, capsys):
    from transformers import HfArgumentParser

    parser = HfArgumentParser(config)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", "unused", "--retain_loss", "kl"])
    assert parsed.retain_loss == "kl"
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", "unused", "--retain_loss", "mse"])
    assert "invalid choice: 'mse'" in capsys.readouterr().err
