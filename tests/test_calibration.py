"""`calibrate`: the promise holds on random data, and the scale is in the weights that anybody loads."""

import json
import math
import random
import warnings

import architectures
import pytest
import torch
from peft import LoraConfig, PeftModel
from test_architectures import ASKS, find_anchors, pictures

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, calibrate
from space_peft.null_space.certificate import RetentionCertificate
from space_peft.records.digests import file_digest
from space_peft.records.folder import MEASURED_NAME
from space_peft.records.measured import check_measured
from space_peft.retained.end_to_end import AnswerComparison
from space_peft.retained.reading import RetainedRows
from space_peft.statistics.calibration import (
    SCALES,
    Calibration,
    check_scales,
    choose,
    items_needed,
    p_value,
    try_scales,
)


# The test


@pytest.mark.parametrize(("risk", "delta"), [(0.01, 0.05), (0.05, 0.05), (0.05, 0.1), (0.5, 0.05), (0.9, 0.2)])
def test_how_many_items_it_takes(risk, delta):
    needed = items_needed(risk, delta)
    assert (1 - risk) ** needed <= delta < (1 - risk) ** (needed - 1)
    assert p_value(0, needed, risk) <= delta
    assert (items_needed(0.01), items_needed(0.05)) == (299, 59)


@pytest.mark.parametrize(("n", "risk"), [(60, 0.05), (300, 0.01), (200, 0.1), (25, 0.3)])
def test_a_risk_above_the_one_allowed_is_hardly_ever_taken(n, risk):
    """Exactly: of all that can happen where the true share is just above `risk`, at most 5 % leads to taking it."""

    def taken(share):
        chances = (math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1))
        return sum(chance for k, chance in enumerate(chances) if choose([1.0], [k], n, risk, 0.05) == 1.0)

    assert taken(risk * 1.0001) <= 0.05 and taken(risk * 1.5) < taken(risk)
    most = max(k for k in range(n + 1) if choose([1.0], [k], n, risk, 0.05))
    # One answer more would break the promise: the test is no stricter than it must be.
    assert sum(math.comb(n, k) * risk**k * (1 - risk) ** (n - k) for k in range(most + 2)) > 0.05


def test_the_promise_holds_over_a_whole_grid():
    """Answers change at a scale once it is above their threshold, as with one adapter: counts of scales depend on each other."""
    draw, n, risk, times = random.Random(1), 120, 0.05, 1500
    scales = tuple(i / 10 for i in range(1, 11))
    true = [0.0, 0.01, 0.02, 0.035, 0.049, 0.0501, 0.06, 0.08, 0.1, 0.2]  # share changed at each scale
    wrong = useful = best_wrong = 0
    for _ in range(times):
        thresholds = [draw.random() for _ in range(n)]
        counts = [sum(t < share for t in thresholds) for share in true]
        by_scale = dict(zip(scales, counts, strict=True))
        tested, found = try_scales(by_scale.get, scales, n, risk)
        assert found == tuple(counts[: len(found)]) and len(tested) == len(found)
        chosen = choose(tested, found, n, risk, 0.05)
        wrong += chosen is not None and true[scales.index(chosen)] > risk
        useful += chosen is not None
        naive = [scale for scale, count in zip(scales, counts) if count / n <= risk]  # what looks fine
        best_wrong += bool(naive) and true[scales.index(naive[-1])] > risk
    assert wrong <= 0.05 * times + 3 * math.sqrt(times * 0.05 * 0.95)
    assert useful > 0.9 * times and best_wrong > 0.3 * times, "there was nothing to get wrong"


def test_testing_stops_at_the_first_scale_that_fails():
    asked = []
    tested, counts = try_scales(lambda s: asked.append(s) or {0.1: 0, 0.2: 90, 0.3: 0}[s], (0.1, 0.2, 0.3), 100, 0.05)
    assert asked == [0.1, 0.2] and tested == (0.1, 0.2) and counts == (0, 90)
    assert choose(tested, counts, 100, 0.05, 0.05) == 0.1
    assert choose((0.1, 0.2, 0.3), (0, 90, 0), 100, 0.05, 0.05) == 0.1  # What passes behind it does not count.
    assert choose((0.1,), (90,), 100, 0.05, 0.05) is None


@pytest.mark.parametrize("scales", [(), (0.0, 1.0), (1.0, 0.5), (0.5, 0.5), (math.nan,), (-1.0, 1.0), (True,), ("1",)])
def test_scales_that_leave_nothing_to_choose_are_refused(scales):
    with pytest.raises(ValueError, match="ascending"):
        check_scales(scales)
    check_scales(SCALES)


def good(**changes):
    values = {"risk": 0.05, "delta": 0.05, "scale": 0.8, "images": 60, "texts": 140,
              "scales": (0.4, 0.8, 1.0), "changed": (0, 3, 9)}  # fmt: skip
    return {**values, **changes}


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 1.0}, {"scale": 0.4}, {"risk": 0.01}, {"delta": 0.001}, {"images": 0, "texts": 50}, {"changed": (0, 9, 3)},
        {"changed": (0, 3)}, {"changed": (0, 3, 201)}, {"changed": (0, -3, 9)}, {"scales": (0.8, 0.4, 1.0)}, {"risk": 0.0},
        {"risk": math.nan}, {"images": 10**300}, {"changed": (0, 3.0, 9)}, {"scale": "0.8"},
    ],
    ids=str,
)  # fmt: skip
def test_a_guarantee_that_does_not_follow_is_refused(change):
    assert Calibration(**good()).p_value == p_value(3, 200, 0.05) <= 0.05
    with pytest.raises(ValueError):
        Calibration(**good(**change))


# With a trainer


def rows(n, seed, words="What colour is leaf {}?"):
    shown = [{"images": [i], "prompt": "What is this?", "completion": "wolf"} for i in pictures(n // 2, seed)]
    return shown + [{"images": [], "prompt": words.format(i), "completion": "green"} for i in range(n - n // 2)]


@pytest.fixture
def trainer(tmp_path):
    """A tiny LLaVA after three steps of an erasure, whose adapter is then made to change many answers."""
    model, processor = architectures.build("llava")
    args = SpaceConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, stop_threshold=None, fit_batch_size=16, canary_items=0,
        certificate_share=0.25, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, own_answers=False,
        learning_rate=0.02,
    )  # fmt: skip
    trainer = SpaceTrainer(
        model, args, anchors=find_anchors(model, processor), retain_dataset=rows(40, seed=1), processing_class=processor, questions=ASKS,
        peft_config=SpaceLoraConfig(r=2, lora_alpha=4),
    )  # fmt: skip
    trainer.train()
    return trainer


def lora_b(trainer):
    return {name: w.detach().clone() for name, w in trainer.model.named_parameters() if ".lora_B." in name}


FRESH = rows(80, seed=2, words="What kind is apple {}?")


def test_the_scale_is_in_the_weights_and_on_the_record(trainer, tmp_path):
    assert trainer.certificate.end_to_end.n == 10  # five images and five texts were held out
    trained, before = lora_b(trainer), trainer.certificate
    trainer.save_model()
    (tmp_path / "report.json").write_text("{}")  # As an evaluation of the adapter as it was trained left it.
    (tmp_path / MEASURED_NAME).write_text(
        json.dumps({"report.json": file_digest(tmp_path / "adapter_model.safetensors")})
    )
    found = calibrate(trainer, 0.2, FRESH, scales=(0.25, 0.5), max_new_tokens=4)
    assert (found.images, found.texts) == (40, 40) and found.scale in (0.25, 0.5)
    for name, weight in lora_b(trainer).items():
        assert torch.equal(weight, trained[name] * found.scale) and weight.abs().max() > 0
    assert trainer.certificate.calibration == found and trainer.certificate.end_to_end.n == 10
    for old, new in zip(before.layers, trainer.certificate.layers):
        assert new.bound == pytest.approx(old.bound * found.scale, rel=1e-5)
        assert new.change == pytest.approx(old.change * found.scale, rel=1e-3)
    trainer.save_model()
    saved = RetentionCertificate.load(tmp_path)
    assert saved == trainer.certificate and saved.weights_digest == file_digest(tmp_path / "adapter_model.safetensors")
    check_measured(tmp_path)
    assert not (tmp_path / "report.json").exists()  # It was of weights that are no more.
    # Stock PEFT has the scale, and the share changed is the one that was counted.
    loaded = PeftModel.from_pretrained(architectures.build("llava")[0], tmp_path).eval()
    data = RetainedRows(FRESH)
    changed = AnswerComparison(loaded, trainer.processing_class, data, range(len(data)), 4).changed()
    assert sum(changed) == found.changed[found.scales.index(found.scale)]
    with pytest.raises(ValueError, match="calibrated already"):
        calibrate(trainer, 0.2, FRESH)


def test_a_strong_adapter_is_made_weaker(trainer):
    with torch.no_grad():
        for layer in trainer.model.modules():
            if hasattr(layer, "lora_B") and "default" in layer.lora_B:
                weight = layer.lora_B["default"].weight
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    with pytest.raises(ValueError, match="no certificate of this adapter"):
        calibrate(trainer, 0.2, FRESH)
    trainer._certify()
    trained = lora_b(trainer)
    scales = (1e-4, 0.01, 1.0)
    found = calibrate(trainer, 0.2, FRESH, scales=scales, max_new_tokens=4)
    assert found.scale < 1.0 and found.changed[-1] > 0.2 * found.n, "it changed too little to be tested"
    assert all(torch.equal(weight, trained[name] * found.scale) for name, weight in lora_b(trainer).items())


def test_where_no_scale_will_do_nothing_is_changed(trainer):
    trained, certificate = lora_b(trainer), trainer.certificate
    with pytest.raises(ValueError, match=r"at the smallest scale, 1000, the adapter changes \d+ of 80 answers"):
        calibrate(trainer, 0.05, FRESH, scales=(1000.0, 2000.0), max_new_tokens=4)
    assert all(torch.equal(weight, trained[name]) for name, weight in lora_b(trainer).items())
    assert trainer.certificate is certificate and certificate.calibration is None


def test_what_cannot_be_shown_is_refused_before_anything_is_asked(trainer, monkeypatch):
    monkeypatch.setattr("space_peft.trainers.risk_control.AnswerComparison", None)
    with pytest.raises(ValueError, match="10 distinct images and texts are held out; .* takes 299"):
        calibrate(trainer)
    with pytest.raises(ValueError, match="80 distinct images and texts .* takes 299"):
        calibrate(trainer, 0.01, FRESH + FRESH)  # Twice the same is no more.
    seen = trainer.retained.rows[trainer.fit_loader.dataset.indices[0]]
    with pytest.raises(ValueError, match="row 80 shares its (image|text) with a retained row"):
        calibrate(trainer, 0.2, [*FRESH, seen])
    for risk, delta in ((0, 0.05), (1, 0.05), (0.1, 0), (True, 0.05), (math.nan, 0.05)):
        with pytest.raises(ValueError, match="must be in"):
            calibrate(trainer, risk, FRESH, delta=delta)
    with pytest.raises(ValueError, match="ascending"):
        calibrate(trainer, 0.2, FRESH, scales=(1.0, 0.5))


def test_rows_that_chose_the_scale_make_no_statement(trainer):
    calibrate(trainer, 0.3, scales=(1e-4,), max_new_tokens=4)  # on the trainer's own ten
    assert trainer.certificate.calibration.n == 10 and trainer.certificate.end_to_end is None
    with pytest.raises(ValueError, match="they give no bound"):
        trainer.measure_end_to_end()
    assert trainer.measure_end_to_end(FRESH).n == 80 == trainer.certificate.end_to_end.n
    trainer.train()  # On: what was promised was of other weights.
    assert trainer.certificate.calibration is None and trainer.certificate.end_to_end.n == 10


def test_too_few_to_hold_out_is_said_at_once(tmp_path):
    model, processor = architectures.build("llava")
    anchors = find_anchors(model, processor)

    def make(share, config):
        args = SpaceConfig(str(tmp_path), certificate_share=share, report_to="none", use_cpu=True)
        model = architectures.build("llava")[0]
        options = {"processing_class": processor, "questions": ASKS, "peft_config": config}
        return SpaceTrainer(model, args, anchors=anchors, retain_dataset=rows(4, seed=1), **options)

    with pytest.warns(UserWarning, match="about 4 distinct images and texts; there will be no certificate"):
        assert not len(make(0.1, SpaceLoraConfig(r=2)).held_out.dataset)
    with pytest.warns(UserWarning, match="measured on 2, which say little"):
        assert len(make(0.5, SpaceLoraConfig(r=2)).held_out.dataset) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "the retained dataset has 4 rows")  # test_few_retained_rows.py
        make(0.0, SpaceLoraConfig(r=2)), make(0.1, LoraConfig(r=2))  # None is wanted, or there never is one.
