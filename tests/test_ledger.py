"""Requests one after another: earlier ones stay forgotten, because what the model sees of them is retained knowledge."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import image_batch, text_batch, tiny_llama, tiny_llava

from space_peft import ErasureLedger, SpaceConfig, SpaceLoraConfig, SpaceTrainer, fit_null_space
from space_peft.anchors import set_anchor_info
from space_peft.anchors.refine import name_probabilities
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.probes import demo_retain_rows, demo_split
from space_peft.losses import IGNORE_INDEX, answer_labels
from space_peft.modeling.prompts import answer_logits, build_batch, generate_answers
from space_peft.null_space import NullSpaceFitter


REQUESTS = ("fox", "lemon")


def inputs(n, dim=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -2, dim, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    return torch.randn(n, dim, dtype=torch.float64, generator=generator) * scales @ basis


# Statistics


@pytest.mark.parametrize("max_rank", [None, 5])
def test_second_moment_is_what_was_fitted(max_rank):
    h = inputs(400)
    moment = h.T @ h / len(h)
    space = NullSpaceFitter(24).update(h).fit("soft", max_rank=max_rank)
    found = space.second_moment()
    assert found.trace() == pytest.approx(moment.trace())
    along = space.eigenvectors.double()
    torch.testing.assert_close(found @ along, moment @ along, rtol=0, atol=1e-5 * moment.trace())
    assert torch.equal(found, found.T) or (found - found.T).abs().max() < 1e-12 * moment.trace()
    if max_rank is None:
        torch.testing.assert_close(found, moment, rtol=0, atol=1e-5 * moment.trace())
    else:
        assert len(space.filters) == 5
        rest = torch.linalg.eigvalsh(found)[:-5]
        assert (rest / rest.mean() - 1).abs().max() < 1e-4  # spread evenly


@pytest.mark.parametrize("max_rank", [None, 5, 1])
def test_what_is_kept_of_a_request_says_how_far_it_may_be_off(max_rank):
    """Of the directions left out only the mean is kept. A bound must hold for the inputs themselves."""
    h = inputs(400)
    moment = h.T @ h / len(h)
    space = NullSpaceFitter(24).update(h).fit("soft", max_rank=max_rank)
    missing = float(torch.linalg.eigvalsh(moment - space.second_moment())[-1])
    assert missing <= space.moment_uncertainty + 1e-6 * float(moment.trace())
    assert space.moment_uncertainty <= missing + 1e-5 * float(moment.trace())
    weight = torch.linalg.eigh(moment - space.second_moment())[1][:, -1:].T
    fitter = NullSpaceFitter(24).update(inputs(400, seed=1), group="text")
    fitter.add_moment(space.second_moment(), "request 1", uncertainty=space.moment_uncertainty)
    kept = fitter.fit("soft", strength=0.003, max_rank=5)
    true = (moment + inputs(400, seed=1).T @ inputs(400, seed=1) / 400) / 2
    folded = kept.project(weight)
    assert float((folded @ true @ folded.T).sqrt()) <= kept.change(folded) * (1 + 1e-5)


def test_a_request_weighs_as_much_as_a_kind_of_token():
    text, image, request = inputs(50), inputs(300, seed=1), inputs(20, seed=2)
    fitter = NullSpaceFitter(24).update(text, group="text").update(image, group="image")
    moment = request.T @ request / len(request)
    fitter.add_moment(moment, "request 1")
    expected = (text.T @ text / 50 + image.T @ image / 300 + moment) / 3
    torch.testing.assert_close(fitter.second_moment(), expected)
    with pytest.raises(ValueError, match="added before"):
        fitter.add_moment(moment, "request 1")
    with pytest.raises(ValueError, match=r"\(3, 3\); expected \(24, 24\)"):
        fitter.add_moment(torch.eye(3), "request 2")


def test_a_hard_constraint_that_keeps_the_complement_says_so():
    space = NullSpaceFitter(24).update(inputs(400)).fit("hard", energy=0.999999)
    assert space.start > 0
    with pytest.raises(ValueError, match="soft"):
        space.second_moment()


def test_the_null_space_keeps_what_is_protected():
    """Every direction the request's inputs are strong in is let through less than without protection."""
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), SpaceLoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    retained, request = [text_batch(seed=1)], [text_batch(seed=2)]
    earlier = fit_null_space(model, request, progress=False)
    free = fit_null_space(model, retained, progress=False)
    kept = fit_null_space(model, retained, progress=False, protect=[earlier])
    assert all("request 1" in space.counts for space in kept.values())
    assert any(space.uncertainty > 0 for space in kept.values()), "the directions left out count"
    # Layers that see the same input still share one null space.
    assert kept["model.layers.0.self_attn.q_proj"] is kept["model.layers.0.self_attn.v_proj"]
    for name, space in kept.items():
        leading = earlier[name].eigenvectors[:, 0]
        assert leading @ space.project(leading) < leading @ free[name].project(leading)
    del earlier["model.layers.0.mlp.down_proj"]
    with pytest.raises(
        ValueError,
        match=r"number 1 of the statistics to protect lacks 1 of the adapted layers.*layers\.0\.mlp\.down_proj",
    ):
        fit_null_space(model, retained, progress=False, protect=[earlier])


# Two requests


def images_of(demo_images, concept):
    return demo_images.select([row for row, name in enumerate(demo_images["name"]) if name == concept])


def make_trainer(
    model, processor, demo_images, concept, folder, protect=(), peft_config=None, keep_model=None, max_steps=25
):
    """On the concept's own images: as anchors they need no refinement, which would be most of the time."""
    anchors = images_of(demo_images, concept)
    anchors = set_anchor_info(anchors.add_column("score", [1.0] * len(anchors)), {"concept": concept})
    retained = [
        row
        for row in demo_retain_rows(concept, demo_split(demo_images, concept)[0], seed=0)[:140]
        if not any(other in str(row["completion"]) for other in REQUESTS)
    ]
    args = SpaceConfig(
        str(folder),
        max_steps=max_steps,
        learning_rate=5e-3,
        keep_weight=60.0,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        canary_items=0,
        own_answers=False,
    )
    return SpaceTrainer(
        model, args, anchors=anchors, retain_dataset=retained, processing_class=processor, questions=DEMO_QUESTIONS, protect=protect,
        peft_config=peft_config or SpaceLoraConfig(r=4, lora_alpha=8, strength=1.0), keep_model=keep_model,
    )  # fmt: skip


def said(model, processor, demo_images, concept):
    images = list(images_of(demo_images, concept)["image"])
    values = name_probabilities(model.eval(), processor, images, DEMO_QUESTIONS.naming[0], concept)
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def served(demo_images, tmp_path_factory):
    """Both requests served: ledger, folded model, processor, and what was said of each concept after each request;
    and which inputs the null spaces were fitted to."""
    folder = tmp_path_factory.mktemp("served")
    model, processor = load_demo_model()
    ledger = ErasureLedger(folder / "ledger")
    history = [[said(model, processor, demo_images, concept) for concept in REQUESTS]]
    counts = []
    for concept in REQUESTS:
        trainer = make_trainer(model, processor, demo_images, concept, folder / "out", ledger.protect)
        trainer.train()
        counts.append(next(iter(trainer.null_spaces.values())).counts)
        model = ledger.add(trainer)
        history.append([said(model, processor, demo_images, concept) for concept in REQUESTS])
    return ledger, model, processor, history, counts


def test_each_request_is_forgotten_and_stays_so(served, demo_images):
    _, model, processor, history, _ = served
    assert min(history[0]) > 0.9
    assert history[1][0] < 0.1 and history[1][1] > 0.8
    assert max(history[2]) < 0.1
    others = [row for row in demo_images.select(range(0, len(demo_images), 9)) if row["name"] not in REQUESTS]
    question = [DEMO_QUESTIONS.naming[0]] * len(others)
    images = [row["image"] for row in others]
    original = generate_answers(load_demo_model()[0], processor, question, images=images)
    answers = generate_answers(model, processor, question, images=images)
    assert sum(a == b for a, b in zip(original, answers, strict=True)) > 0.93 * len(others)


def test_the_null_space_of_the_next_request_counts_the_earlier_ones(served):
    counts = served[-1]
    assert [("request 1" in seen, "request 2" in seen) for seen in counts] == [(False, False), (True, False)]


def test_the_ledger_says_what_was_erased_when(served):
    ledger = served[0]
    written = json.loads((ledger.folder / "space_ledger.json").read_text())
    assert [request["concept"] for request in written["requests"]] == list(REQUESTS)
    assert {"concept", "aliases", "method", "steps", "date"} == set(written["requests"][0])
    assert sorted(path.name for path in ledger.folder.iterdir()) == ["001", "002", "space_ledger.json"]
    assert ErasureLedger(ledger.folder).requests == ledger.requests == written["requests"]


def test_folded_again_and_stacked_are_the_same_model(served, demo_images, tmp_path):
    ledger, model, processor, _, _ = served
    images = list(demo_images["image"][::60])
    batch = build_batch(processor, ["what is this?"] * len(images), images=images)
    batch.pop("labels")
    again = ErasureLedger(ledger.folder)
    stacked = again.stack(load_demo_model()[0]).eval()
    assert list(stacked.peft_config) == ["default"] and stacked.peft_config["default"].r == 8
    stacked.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(load_demo_model()[0], tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert (load_demo_model()[0](**batch).logits - expected).abs().max() > 0.1
        for other in (again.fold(load_demo_model()[0]).eval(), stacked, loaded):
            assert (other(**batch).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("keeps_original", [False, True])
def test_what_retained_rows_are_held_to(served, demo_images, tmp_path, keeps_original):
    """The folded model's answers, or the original's: those of a model that has forgotten nothing."""
    folded, processor, original = copy.deepcopy(served[1]), served[2], load_demo_model()[0]
    weights = {name: weight.clone() for name, weight in original.state_dict().items()}
    options = {"keep_model": original, "max_steps": 2} if keeps_original else {"max_steps": 2}
    trainer = make_trainer(folded, processor, demo_images, "crown", tmp_path, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    # While the adapter is 0, the model differs from the original by the earlier erasures alone.
    first = next(log["loss_keep"] for log in trainer.state.log_history if "loss_keep" in log)
    assert (before > 1e-4 and first > 1e-3) if keeps_original else (before == 0 and abs(first) < 1e-5)
    batch = next(iter(trainer.get_train_dataloader()))
    model = original if keeps_original else served[1].eval()
    for kind, expected in (("retain", model), ("forget", served[1].eval())):
        part = batch[kind]
        found = trainer._deployed_logits(kind, part, batch[f"{kind}_rows"])
        answered = answer_labels(part["labels"]) != IGNORE_INDEX
        with torch.no_grad():
            logits = answer_logits(expected, part)
        difference = (found - logits)[:, : answered.shape[1]][answered].abs().max()
        assert difference < 1e-4 and not found.requires_grad
    assert all(torch.equal(weight, weights[name]) for name, weight in original.state_dict().items())


# Bad input


def test_the_model_to_keep_is_not_the_one_that_learns(demo_images, tmp_path):
    model, processor = load_demo_model()
    with pytest.raises(ValueError, match="`keep_model` is `model` itself"):
        make_trainer(model, processor, demo_images, "fox", tmp_path, keep_model=model)


def test_bad_input_is_refused(demo_model, demo_images, served, tmp_path):
    ledger = served[0]
    model, processor = demo_model
    with pytest.raises(ValueError, match="nothing to stack"):
        ErasureLedger(tmp_path / "none").stack(model)
    assert not (tmp_path / "none").exists()
    untrained = make_trainer(model, processor, demo_images, "fox", tmp_path / "out")
    with pytest.raises(ValueError, match="call `train`"):
        ErasureLedger(tmp_path / "none").add(untrained)
    with pytest.raises(ValueError, match="pass a SpaceLoraConfig"):
        make_trainer(
            load_demo_model()[0], processor, demo_images, "fox", tmp_path / "out", ledger.protect, LoraConfig(r=4)
        )
    (tmp_path / "space_ledger.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not a ledger of erasures"):
        ErasureLedger(tmp_path)


# The stack of adapters with other settings


@pytest.mark.parametrize(
    "settings",
    [
        [{"use_rslora": True}, {"use_rslora": True}],
        [{"use_rslora": True}, {}, {"use_rslora": True, "r": 3}],
        [{"alpha_pattern": {"q_proj": 5}}, {"rank_pattern": {r"layers\.1\.self_attn\.v_proj": 1}}],
        [{"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True}, {"r": 1}],
        [{"target_modules": ["q_proj"]}, {"target_modules": ["fc1", "v_proj"], "rank_pattern": {"fc1": 4}}],
    ],
)
def test_the_stack_of_any_settings_is_the_folded_model(settings, tmp_path):
    torch.manual_seed(0)
    model = tiny_llava()
    for number, setting in enumerate(settings, start=1):
        config = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **setting}
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
        adapted.save_pretrained(tmp_path / "ledger" / f"{number:03d}")
        model = adapted.merge_and_unload()
    requests = [{"concept": str(number)} for number in range(len(settings))]
    (tmp_path / "ledger" / "space_ledger.json").write_text(
        json.dumps({"format": "space_peft.ledger.v1", "requests": requests})
    )
    ledger, batch = ErasureLedger(tmp_path / "ledger"), image_batch()
    stacked = ledger.stack(tiny_llava()).eval()
    stacked.save_pretrained(tmp_path / "stack")
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path / "stack").eval()
    with torch.no_grad():
        folded = ledger.fold(tiny_llava()).eval()(**batch).logits
        assert (tiny_llava()(**batch).logits - folded).abs().max() > 0.1
        for other in (stacked, loaded, model.eval(), stacked.merge_and_unload()):
            assert (other(**batch).logits - folded).abs().max() < 1e-4
