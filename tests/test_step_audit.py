"""Inside a training step the library's own code waits for no device and computes nothing in float64."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import image_batch, tiny_llava

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, fit_null_space
from space_peft.demo import DEMO_QUESTIONS
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.null_space.leaks import measure_leaks
from space_peft.trainers.running_metrics import RunningMetrics


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_parts.audit import StepAudit  # noqa: E402


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"keep_weight": 60.0, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"target": "all", "overwrite": "a thing"}, marks=pytest.mark.slow),
    ],
    ids=["defaults", "with retained rows", "both sides"],
)
def test_a_step_in_bfloat16_waits_for_nothing_of_ours(demo_model, demo_erasure_data, tmp_path, options):
    model, processor = demo_model
    anchors, retain = demo_erasure_data
    audit = StepAudit(first=3)  # By then it is known that every layer gets a gradient.
    trainer = SpaceTrainer(
        model=model.to(torch.bfloat16),
        args=SpaceConfig(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=True, own_answers=False, canary_items=0, **options,
        ),
        anchors=anchors.select(range(4)), retain_dataset=retain[:40], processing_class=processor,
        peft_config=SpaceLoraConfig(r=4), questions=DEMO_QUESTIONS, callbacks=[audit],
    )  # fmt: skip
    trainer.train()
    assert audit.steps == 2
    assert not audit.own(audit.waits)
    assert not audit.doubles
    # It does see what transformers asks for in the very same steps.
    assert sum(audit.waits.values()) >= 2 * 3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(isinstance(entry["loss_task"], float) and entry["lora_b_grad_min"] > 0 for entry in logged)


def test_an_audit_finds_what_it_is_for():
    x = torch.rand(6, 6)

    def audited(work):
        audit = StepAudit()
        with audit.watching():
            work()
        return [what for _, what, _ in audit.waits.elements()], [what for _, what, _ in audit.doubles.elements()]

    assert audited(lambda: (x @ x).relu().sum()) == ([], [])
    for work, what in (
        (lambda: x.sum().item(), "item"),
        (lambda: x.tolist(), "tolist"),
        (lambda: bool(x[0, 0] > 2), "__bool__"),
        (lambda: float(x.sum()), "__float__"),
        (lambda: x.cpu(), "cpu"),
        (lambda: x[x > 0.5], "index"),
        (lambda: torch.nonzero(x), "nonzero"),
        (lambda: torch.equal(x, x), "equal"),
        (lambda: torch.linalg.svdvals(x), "_linalg_svd"),
    ):
        waits, doubles = audited(work)
        assert what in waits and not doubles
    assert audited(lambda: x.double() @ x.double().T)[1].count("mm") == 1


def test_leaks_of_all_layers_are_read_together():
    from peft import get_peft_model

    model = get_peft_model(tiny_llava(), SpaceLoraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules="all-linear"))
    spaces = fit_null_space(model, [image_batch()], progress=False)
    layers = adapted_layers(model)
    for layer in layers.values():
        torch.nn.init.normal_(lora_weights(layer)[1])
    audit = StepAudit()
    with audit.watching():
        leaks = measure_leaks(model, spaces)
    assert list(leaks) == list(layers) and len(layers) > 10
    # To the host and back for each rank, and once for all layers; the rest is read there.
    assert sum(count for (_, what, where), count in audit.waits.items() if what == "cpu" and "leaks" in where) == 3
    for name, layer in layers.items():
        a, b, scaling = lora_weights(layer)
        change = spaces[name].change(scaling * b.double() @ a.double())
        assert leaks[name] == pytest.approx(change / (spaces[name].scale * spaces[name].dim) ** 0.5, rel=1e-4)


def test_metrics_are_means_read_once():
    metrics = RunningMetrics()
    assert metrics.take() == {}
    for value in (1.0, 3.0):
        metrics.add("loss", torch.tensor(value))
        metrics.add("entropy", lambda value=value: torch.tensor(value, dtype=torch.bfloat16) + 1)
    metrics.add("once", torch.tensor(5, dtype=torch.float64))
    audit = StepAudit()
    with audit.watching():
        taken = metrics.take()
    assert taken == {"loss": 2.0, "entropy": 3.0, "once": 5.0} and list(taken) == ["loss", "entropy", "once"]
    assert [what for _, what, _ in audit.waits.elements()] == ["tolist"]
    assert metrics.take() == {}
