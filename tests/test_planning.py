"""A plan's figures are those that a run has: on tiny models of every architecture, with weights and without."""

import math

import architectures
import pytest
import torch
from peft import get_peft_model
from test_architectures import build, pictures, retained_rows
from tiny_models import image_batch, tiny_llava
from torch.utils.flop_counter import FlopCounterMode

from space_peft import NullSpaceFitter, SpaceLoraConfig, fit_null_space
from space_peft.cli.plan import empty_model
from space_peft.modeling.layers import adapted_layers, base_model
from space_peft.modeling.targets import default_target_modules
from space_peft.null_space.base_statistics import SecondMoment, kept_rank
from space_peft.null_space.collecting import linear_layers
from space_peft.null_space.constraints import FITTED, most_columns
from space_peft.null_space.fitting import collect_moments
from space_peft.null_space.moments import sum_flops
from space_peft.null_space.planning import _null_space_bytes, plan_erasure
from space_peft.null_space.workload import Workload, picture_tokens
from space_peft.retained.reading import RetainedRows, retained_loader


ALL = list(architectures.ARCHITECTURES)
TENSORS = ("eigenvectors", "filters", "eigenvalues", "residuals")


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def space_bytes(space):
    return size(getattr(space, field) for field in TENSORS)


def adapted(model, target="all", **options):
    settings = {"r": 2, "target_modules": default_target_modules(model, target), **options}
    return get_peft_model(model, SpaceLoraConfig(**settings))


def workload(model, **options):
    return Workload.of(base_model(model).config, rows=6, steps=3, batch_size=2, **options)


@pytest.mark.parametrize("name", ALL)
def test_a_plan_is_what_a_fit_then_has(name):
    model, processor = build(name)
    model = adapted(model)
    rows = RetainedRows(retained_rows(pictures(3)))
    loader = retained_loader(processor, rows, range(len(rows)), 3)
    layers, plan = adapted_layers(model), plan_erasure(model, workload(model))

    assert [layer.name for layer in plan.layers] == list(layers)
    assert plan.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.adapter_state == 4 * size(p for p in model.parameters() if p.requires_grad)
    assert sum(plan.weights.values()) == size(p for p in model.parameters() if not p.requires_grad)

    fitters = collect_moments(model, loader, dtype=torch.float32, progress=False)
    sources = {layer.name: layer.source for layer in plan.layers}
    for one in layers:
        assert fitters[one] is fitters[sources[one]], "planned to share an input that they do not"
    unique = {id(fitter): fitter for fitter in fitters.values()}.values()
    assert len(plan.unique) == len(unique)
    assert {layer.source: set(layer.kinds) for layer in plan.unique} == {
        layer.name: set(fitters[layer.name].counts) for layer in plan.unique
    }
    assert plan.sums == sum(size(fitter.state_dict()["sums"].values()) for fitter in unique)

    spaces = fit_null_space(model, loader, progress=False)
    total = sum(space_bytes(space) for space in {id(space): space for space in spaces.values()}.values())
    assert total <= plan.null_spaces
    assert all(spaces[layer.name].rank <= layer.columns for layer in plan.layers)

    # Of all layers, adapters or not: what `space-peft stats` would publish.
    every = collect_moments(
        model, loader, layers=linear_layers(model, None), dtype=torch.float32, progress=False, unseen_allowed=True
    )
    every = {id(fitter): fitter for fitter in every.values()}.values()
    kept = [SecondMoment.of(f.second_moment(), f.counts, kept_rank(f.dim)) for f in every if f.counts]
    assert len(kept) == len(every)
    assert plan.published == sum(size((moment.vectors, moment.values)) for moment in kept)


@pytest.mark.parametrize("target", ["language", "vision", "all"])
@pytest.mark.parametrize("name", ALL)
def test_a_model_without_weights_has_the_same_plan(name, target):
    model, _ = build(name)
    empty = empty_model(model.config, model.dtype)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    with_weights, without = (
        plan_erasure(one, workload(one)).to_dict() for one in (adapted(model, target), adapted(empty, target))
    )
    assert with_weights == without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_dtype(dtype):
    config = tiny_llava().config
    plan = plan_erasure(adapted(empty_model(config, dtype)), workload(tiny_llava()))
    assert plan.dtype == str(dtype).removeprefix("torch.")
    real = adapted(tiny_llava().to(dtype))
    assert sum(plan.weights.values()) == size(p for p in real.parameters() if not p.requires_grad)
    # PEFT keeps an adapter in float32.
    assert plan.adapter_state == 4 * size(p for p in real.parameters() if p.requires_grad)
    assert plan.adapter_state == 16 * plan.parameters


@pytest.mark.parametrize("constraint", FITTED)
@pytest.mark.parametrize("limit", [None, 3, 17])
@pytest.mark.parametrize("dim", [8, 40, 200])
def test_a_null_space_is_no_larger_than_planned(constraint, limit, dim):
    generator = torch.Generator().manual_seed(dim)
    for samples, strength in ((3, 0.03), (4 * dim, 1.0)):
        h = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
        fitter = NullSpaceFitter(dim).update(h * torch.logspace(0.5, -0.5, dim, dtype=torch.float64))
        space = fitter.fit(constraint, strength=strength, max_rank=limit, energy=0.5)
        planned = _null_space_bytes(constraint, limit, dim)
        assert space_bytes(space) <= planned
        assert space.eigenvectors.shape[1] <= most_columns(constraint, limit, dim)
    if FITTED[constraint].foreseen:
        # With inputs in every direction and a filter that tells them all apart, there is nothing to spare.
        assert space_bytes(space) == planned


@pytest.mark.parametrize("dim", [5, 256, 600])
def test_flops_of_sums_are_counted_exactly(dim):
    def in_place(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    fitter = NullSpaceFitter(dim, dtype=torch.float32)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        fitter.update(torch.randn(7, dim))
    assert counter.get_total_flops() == sum_flops(7, dim)


@pytest.mark.parametrize("target", ["language", "vision", "all"])
def test_flops_and_activations_of_a_step_are_about_those_of_a_step(target):
    model = adapted(tiny_llava(), target).train()
    batch = image_batch(rows=2, text=12)
    batch.pop("labels")
    # The tower sees a class token, too.
    plan = plan_erasure(model, Workload(6, 4, 16, 5, steps=3, batch_size=2))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(**batch, logits_to_keep=1)
    per_row = plan.flops["passes"] / 6
    assert per_row * 2 == pytest.approx(forward.get_total_flops(), rel=0.3)
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as step, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, logits_to_keep=1).logits.sum().backward()
    assert plan.flops["step"] == pytest.approx(step.get_total_flops(), rel=0.3)
    assert 0.4 < plan.activations / sum(saved.values()) < 2.5
    assert plan.flops["steps"] == 3 * plan.flops["step"]


def test_time_is_the_step_that_was_timed():
    plan = plan_erasure(adapted(tiny_llava()), Workload(60, 4, 16, 5, steps=30, batch_size=2))
    seconds = plan.timed(0.5)
    assert seconds["steps"] == 15.0
    rate = plan.flops["step"] / 0.5
    fitting = plan.flops["passes"] + plan.flops["sums"]
    assert seconds["fitting"] == pytest.approx(fitting / rate)
    assert seconds["all"] == pytest.approx(15.0 + (fitting + plan.flops["decomposition"]) / rate)


def test_tokens_count_up_to_the_limit_of_each_kind():
    def counted(**options):
        settings = {"tokens_per_row": 10, **options}
        return plan_erasure(adapted(tiny_llava(), **settings), Workload(3, 40, 46, 40)).counted

    assert counted() == 3 * (10 + 6)
    assert counted(tokens_per_row=None) == 3 * 46
    assert counted(statistics="pooled") == 3 * 2


def test_what_a_fit_would_refuse_is_found_without_weights():
    from transformers import LlamaConfig

    config = tiny_llava().config
    config.tie_word_embeddings = True
    config.text_config = LlamaConfig(**{**config.text_config.to_dict(), "tie_word_embeddings": True})
    for model in (empty_model(config, torch.float32), type(tiny_llava())(config)):
        tied = get_peft_model(model, SpaceLoraConfig(r=2, target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="shares its weight") as error:
            fit_null_space(tied, [image_batch()], progress=False)
        assert str(error.value) in plan_erasure(tied, workload(tied)).refused
    (said,) = plan_erasure(adapted(tiny_llava()), Workload(3, 0, 46, 0)).refused
    assert "would see no retained data" in said
    assert not plan_erasure(adapted(tiny_llava(), "language"), Workload(3, 0, 46, 0)).refused
    config = tiny_llava().config
    config.image_token_id = None
    (said,) = plan_erasure(adapted(empty_model(config, torch.float32)), Workload(3, 4, 46, 4)).refused
    assert "names no image token" in said


@pytest.mark.parametrize(
    ("numbers", "said"),
    [((0, 4, 9, 4), "`rows` is 0"), ((3, 9, 4, 9), "cannot hold a picture"), ((3, True, 4, 4), "`image_tokens`")],
)
def test_workloads_that_cannot_be_are_refused(numbers, said):
    with pytest.raises(ValueError, match=said):
        Workload(*numbers)


def test_tokens_of_a_picture_are_those_of_the_config():
    assert picture_tokens(tiny_llava().config) == (4, 4)
    assert picture_tokens(build("gemma3")[0].config) == (16, 4)
    assert picture_tokens(build("idefics3")[0].config) == (16, 4)
    assert picture_tokens(build("internvl")[0].config) == (16, 4)
    patches, merged = picture_tokens(build("qwen2_5_vl")[0].config)  # as large as the picture
    assert (patches, merged) == (4 * 256, 256)
    assert Workload.of(tiny_llava().config, rows=1, image_tokens=10).patches == 10
    assert Workload.of(build("gemma3")[0].config, rows=1, image_tokens=10).patches == math.ceil(10 * 16 / 4)
