"""The cost model of `benchmarks/scale.py` against what PyTorch counts, on three sizes."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from space_peft import SpaceLoraConfig, fit_null_space
from space_peft.modeling.targets import default_target_modules
from space_peft.null_space.fitting import collect_moments
from space_peft.null_space.planning import plan_erasure
from space_peft.null_space.projection import attach_null_space
from space_peft.null_space.spectral import decompose, decomposition_flops
from space_peft.null_space.workload import Workload


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scale  # noqa: E402


ROWS, TEXT, COLUMNS = 2, 12, 3
# Layers, width, feed-forward width, heads, heads of keys; layers and width of the tower; side of a picture in patches.
SIZES = {
    "narrow": (2, 32, 64, 4, 4, 2, 32, 3),
    "wide": (2, 96, 256, 4, 2, 2, 48, 4),
    "deep": (5, 64, 224, 8, 2, 3, 64, 6),
}
IMAGE_TOKEN = 63


def llava(size):
    layers, width, wide, heads, keys, tower_layers, tower, side = SIZES[size]
    text = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=tower, intermediate_size=2 * tower, num_hidden_layers=tower_layers, num_attention_heads=2,
        image_size=4 * side, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=side**2, vision_feature_layer=-1
    )  # fmt: skip
    torch.manual_seed(0)
    # Every product of attention as one that is counted; kernels for it are not, on a CPU.
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 60, (ROWS, side**2 + TEXT))
    ids[:, : side**2] = IMAGE_TOKEN
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(ROWS, 3, 4 * side, 4 * side),
    }
    return model, batch, (side**2, side**2, side**2 + TEXT)


def adapted(model):
    return get_peft_model(model, SpaceLoraConfig(r=4, target_modules=default_target_modules(model, "language")))


def counted(work, **options):
    with FlopCounterMode(display=False, **options) as counter:
        work()
    return counter.get_total_flops()


def close(modelled, measured):
    assert measured > 0
    assert modelled == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("size", SIZES)
def test_a_pass_and_a_picture(size):
    model, batch, sizes = llava(size)
    m = scale.Model.of(model)
    with torch.no_grad():
        measured = counted(lambda: model(**batch, logits_to_keep=COLUMNS))
        seen = counted(lambda: model.model.get_image_features(batch["pixel_values"]))
    close(ROWS * scale.forward(m, *sizes, columns=COLUMNS), measured)
    close(ROWS * scale.picture(m, *sizes[:2]), seen)


@pytest.mark.parametrize("size", SIZES)
def test_an_answer(size):
    model, batch, sizes = llava(size)
    m = scale.Model.of(model)
    model.generation_config.eos_token_id = None
    measured = counted(lambda: model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False))
    close(ROWS * scale.generation(m, *sizes, 5), measured)


@pytest.mark.parametrize("size", SIZES)
def test_a_training_step_and_its_projections(size):
    model, batch, (patches, image_tokens, tokens) = llava(size)
    m = scale.Model.of(model)
    model = adapted(model).train()
    plan = plan_erasure(model, Workload(8, image_tokens, tokens, patches, steps=1, batch_size=ROWS))
    spaces = fit_null_space(model, [batch], progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach_null_space(model, optimizer, spaces)
    head = model.get_base_model().lm_head

    def work():
        hidden = torch.rand(ROWS, COLUMNS, head.in_features)
        with torch.no_grad():
            head(hidden)  # The deployed model's logits, from what was kept of it.
        model(**batch, logits_to_keep=COLUMNS).logits.sum().backward()

    close(ROWS * scale.step_row(m, plan, COLUMNS), counted(work))

    def in_place(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    measured = counted(optimizer.step, custom_mapping={torch.ops.aten.addmm_: in_place})
    kept = sum(8 * layer.rank * layer.inputs * spaces[layer.name].rank for layer in plan.layers)
    close(kept, measured)
    assert scale.projection(plan) >= kept  # Where the plan knows how many eigenvectors there are at most.


@pytest.mark.parametrize("size", SIZES)
def test_a_step_of_refinement(size):
    model, batch, (patches, image_tokens, tokens) = llava(size)
    m = scale.Model.of(model)
    model.requires_grad_(False)
    pixels = batch["pixel_values"].requires_grad_()
    measured = counted(lambda: model(**batch, logits_to_keep=COLUMNS).logits.sum().backward())
    assert pixels.grad is not None
    close(ROWS * scale.refinement_row(m, Workload(8, image_tokens, tokens, patches), COLUMNS), measured)


@pytest.mark.parametrize("size", SIZES)
def test_statistics(size):
    model, batch, (patches, image_tokens, tokens) = llava(size)
    m = scale.Model.of(model)
    model = adapted(model)
    plan = plan_erasure(model, Workload(ROWS, image_tokens, tokens, patches))

    def in_place(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    def work():
        collect_moments(model, [batch], dtype=torch.float32, tokens_per_row=64, progress=False)

    stages = scale.costs(m, plan)
    modelled = stages["statistics: passes"].flops + stages["statistics: second moments"].flops
    close(modelled, counted(work, custom_mapping={torch.ops.aten.addmm_: in_place}))


@pytest.mark.parametrize("dim", [512, 640, 768])
def test_a_decomposition(dim):
    places = torch.arange(1, dim + 1, dtype=torch.float32)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))).Q
    values = places**-0.9
    values /= values.mean()
    moment = (basis * values) @ basis.T
    count = dim // 32 + 1
    measured = counted(lambda: decompose(moment, count, lambda v: 0.03 / (v + 0.03) ** 2))
    print("decomposition", dim, decomposition_flops(dim, count) / measured)
    close(decomposition_flops(dim, count), measured)


def test_cards_divide_what_can_be_divided():
    stage = scale.Stage(flops=1e15, bytes=0.0)
    assert scale.seconds(stage, scale.H100, 8) == pytest.approx(scale.seconds(stage, scale.H100) / 8)
    alone = scale.Stage(flops=1e15, bytes=0.0, shared=1)
    assert scale.seconds(alone, scale.H100, 64) == scale.seconds(alone, scale.H100)
    reading = scale.Stage(flops=1.0, bytes=3.35e12)
    assert scale.seconds(reading, scale.H100) == pytest.approx(1 / 0.6)
    assert scale.seconds(scale.Stage(1e15, 0.0, "single"), scale.H100) > 10 * scale.seconds(stage, scale.H100)


@pytest.mark.slow
def test_the_page_has_the_tables_of_today():
    """`python benchmarks/scale.py` writes them."""
    assert scale.tables() in scale.PAGE.read_text(encoding="utf-8")
