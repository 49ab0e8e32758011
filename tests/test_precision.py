"""Low precision, quantised bases, gradient checkpointing and offloaded layers: gradients flow, the constraint holds."""

import contextlib
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from tiny_models import IMAGE_TOKEN, VOCABULARY, image_batch, text_batch, tiny_llama, tiny_llava, train, trainable
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from space_peft.config import SpaceLoraConfig
from space_peft.modeling.layers import adapted_layers, evaluating, lora_weights
from space_peft.null_space.callback import NullSpaceCallback
from space_peft.null_space.certificate import measure_certificate
from space_peft.null_space.fitting import collect_moments, fit_null_space
from space_peft.null_space.observing import observe_inputs
from space_peft.null_space.projection import attach_null_space


RETAINED = [image_batch(rows=4, text=6, seed=1), text_batch(rows=4, length=9, seed=2, pad=3)]
FORGET = image_batch(rows=3, seed=9)
STEPS = 6
BFLOAT16_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Setting:
    """One way to load and to train a model."""

    dtype: torch.dtype = torch.float32
    quantised: dict = field(default_factory=dict)
    autocast: torch.dtype | None = None
    checkpointing: str | None = None
    adapter: torch.dtype = torch.float32


INT8 = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
SETTINGS = {
    "float32": Setting(),
    "float32, bfloat16 autocast": Setting(autocast=torch.bfloat16),
    "float32, float16 autocast": Setting(autocast=torch.float16),
    "float32, reentrant checkpointing": Setting(checkpointing="reentrant"),
    "float32, checkpointing": Setting(checkpointing="non-reentrant"),
    "bfloat16": Setting(torch.bfloat16),
    "bfloat16, autocast, checkpointing": Setting(torch.bfloat16, {}, torch.bfloat16, "non-reentrant"),
    "bfloat16, bfloat16 adapter": Setting(torch.bfloat16, adapter=torch.bfloat16),
    "float16": Setting(torch.float16),
    "float16, autocast": Setting(torch.float16, autocast=torch.float16),
    "int8": Setting(torch.bfloat16, INT8),
    "int8, autocast, reentrant checkpointing": Setting(torch.bfloat16, INT8, torch.bfloat16, "reentrant"),
    "nf4": Setting(torch.bfloat16, NF4),
    "nf4, float32 around it": Setting(torch.float32, NF4),
    "nf4, double quantisation": Setting(torch.bfloat16, {**NF4, "bnb_4bit_use_double_quant": True}),
    "nf4, autocast, reentrant checkpointing": Setting(torch.bfloat16, NF4, torch.bfloat16, "reentrant"),
    "nf4, bfloat16 adapter, autocast": Setting(torch.bfloat16, NF4, torch.bfloat16, adapter=torch.bfloat16),
    "fp4": Setting(torch.bfloat16, {**NF4, "bnb_4bit_quant_type": "fp4"}),
}


def wide_llava():
    """A Llava whose dimensions are multiples of 64, as 4-bit kernels want them."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        initializer_range=0.15,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    wide_llava().save_pretrained(folder)
    return folder


def load(folder, setting, **lora):
    """The model as a user would load it, with an adapter on all of its linear layers."""
    options = {}
    if setting.quantised:
        pytest.importorskip("bitsandbytes")
        options = {"quantization_config": BitsAndBytesConfig(**setting.quantised), "device_map": {"": "cpu"}}
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=setting.dtype, **options)
    if setting.checkpointing:
        kwargs = {"use_reentrant": setting.checkpointing == "reentrant"}
        if setting.quantised:
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
    torch.manual_seed(1)
    config = SpaceLoraConfig(r=4, target_modules="all-linear", **lora)
    model = get_peft_model(model, config, autocast_adapter_dtype=setting.adapter == torch.float32)
    for weight in trainable(model):
        weight.data = weight.data.to(setting.adapter)  # TRL's QLoRA does this, PEFT does not for quantised bases
    return model


class FreeWeights:
    """Follows `A'` in `A = A' P`: what the optimiser alone would have made of `A`, in float64."""

    def __init__(self, model, optimizer):
        self.weights = {name: lora_weights(layer)[0] for name, layer in adapted_layers(model).items()}
        self.values = {name: a.detach().double() for name, a in self.weights.items()}
        self.previous = {}
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)  # attached first, so it runs before the projection

    def _before(self, *_):
        self.previous = {name: a.detach().double().clone() for name, a in self.weights.items()}

    def _after(self, *_):
        for name, a in self.weights.items():
            self.values[name] += a.detach().double() - self.previous[name]


def train_constrained(model, setting, spaces):
    """A few steps of AdamW; every `lora_B` must get a gradient in each of them."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    free = FreeWeights(model, optimizer)
    attach_null_space(model, optimizer, spaces)
    dtype = model.get_base_model().dtype
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in FORGET.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=setting.autocast == torch.float16)
    model.train()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        autocast = torch.autocast("cpu", setting.autocast) if setting.autocast else contextlib.nullcontext()
        with autocast:
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        for name, layer in adapted_layers(model).items():
            gradient = lora_weights(layer)[1].grad
            assert gradient is not None and torch.isfinite(gradient).all(), name
            assert gradient.abs().max() > 0, f"no gradient reaches lora_B of {name}"
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    model.eval()
    return free, losses


@pytest.mark.filterwarnings("ignore:.*are of low precision:UserWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("constraint", ["soft", "hard"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_flow_and_the_constraint_holds(saved_model, name, constraint):
    setting = SETTINGS[name]
    model = load(saved_model, setting, constraint=constraint, energy=0.9)
    assert {weight.dtype for weight in trainable(model)} == {setting.adapter}
    spaces = fit_null_space(model, RETAINED, progress=False)
    for space in spaces.values():
        assert all(torch.isfinite(x).all() for x in (space.eigenvectors, space.filters, space.eigenvalues))
        assert 0 < space.rank
    free, losses = train_constrained(model, setting, spaces)
    assert losses[-1] < losses[0] - 0.05, "nothing was learnt"

    rounding = 1e-6 if setting.adapter == torch.float32 else BFLOAT16_ROUNDING
    for layer, a in free.weights.items():
        expected = spaces[layer].project(free.values[layer])
        # The path of A' is the optimiser's own: the projection took nothing but what lies outside of the null space.
        assert (a.double() - expected).norm() <= rounding * expected.norm(), layer
        if constraint == "hard":
            outside = a.double() - spaces[layer].project(a.double())
            assert outside.norm() <= rounding * a.double().norm(), layer

    certificate = measure_certificate(model, spaces, RETAINED, progress=False)
    assert len(certificate.layers) == len(free.weights)
    unconstrained = []
    for layer in certificate.layers:
        assert 0 < layer.change <= layer.fitted_change * (1 + 2e-3), layer
        assert layer.fitted_change <= layer.bound, layer
        _, b, scaling = lora_weights(adapted_layers(model)[layer.name])
        unconstrained.append(spaces[layer.name].change(scaling * b.detach().double() @ free.values[layer.name]))
    assert sum(layer.change for layer in certificate.layers) < 0.5 * sum(unconstrained)


@pytest.mark.parametrize("constraint", ["soft", "hard"])
def test_low_precision_adapter_drifts_no_further_than_its_rounding(constraint):
    """Many small steps in bfloat16: without the float32 copy the error of the soft constraint grows to 1e-1."""
    model = get_peft_model(
        tiny_llama(), SpaceLoraConfig(r=4, target_modules=["q_proj", "down_proj"], constraint=constraint, energy=0.9)
    )
    spaces = fit_null_space(model, [text_batch(rows=8, seed=5)], progress=False)
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-4)
    free = FreeWeights(model, optimizer)
    with pytest.warns(UserWarning, match=r"4 lora_A are of low precision, the first is torch.bfloat16 in layer 'model"):
        attach_null_space(model, optimizer, spaces)
    train(model, optimizer, text_batch(rows=4, seed=6), steps=100)
    for name, a in free.weights.items():
        expected = spaces[name].project(free.values[name])
        assert (a.double() - expected).norm() <= BFLOAT16_ROUNDING * expected.norm(), name
        assert (a.double() - expected).norm() > 1e-5 * expected.norm(), "not rounded, so nothing is shown"

    # What somebody loads between steps replaces the float32 copy.
    a = next(iter(free.weights.values()))
    loaded = torch.randn_like(a)
    a.data.copy_(loaded)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, text_batch(rows=4, seed=6), steps=1)
    assert torch.equal(a.detach(), loaded)


def test_statistics_are_not_rounded_by_autocast(saved_model):
    model = load(saved_model, Setting())
    sums, counts = {}, {}

    def visit(name, x, parts):
        for group, mask in parts():
            h = (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).double()
            key = (name, group)
            sums[key] = sums.get(key, 0) + h.T @ h
            counts[key] = counts.get(key, 0) + len(h)

    with torch.autocast("cpu", torch.bfloat16):
        observe_inputs(model, RETAINED, adapted_layers(model), visit, progress=False)
        moments = collect_moments(model, RETAINED, progress=False)
    for name, fitter in moments.items():
        parts = [sums[key] / counts[key] for key in sums if key[0] == name]
        expected = sum(parts) / len(parts)
        assert (fitter.second_moment() - expected).norm() <= 1e-5 * expected.norm(), name


def test_callback_under_mixed_precision(tmp_path):
    model = get_peft_model(tiny_llama(), SpaceLoraConfig(r=4, target_modules="all-linear", constraint="hard"))
    rows = [{key: value[i] for key, value in text_batch(rows=4, seed=6).items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=5,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=True,
    )
    callback = NullSpaceCallback([text_batch(rows=1, length=12, seed=5)])
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    for name, layer in adapted_layers(model).items():
        a, b, _ = lora_weights(layer)
        assert b.abs().max() > 1e-3, name
        assert (a - callback.null_spaces[name].project(a)).norm() <= 1e-6 * a.norm(), name


def four_bit_model(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load(folder, Setting(torch.bfloat16, NF4))
    layer = next(module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
    return model, layer


def test_4_bit_weights_laid_out_for_inference_are_refused(saved_model):
    """bitsandbytes' CPU kernel for inference has no backward pass; lora_B of earlier layers would get no gradient."""
    model, layer = four_bit_model(saved_model)
    if not getattr(layer, "support_avx512bf16_for_cpu", False):
        pytest.skip("this CPU has no such kernel")
    spaces = fit_null_space(model, RETAINED, progress=False)  # as in evaluation mode, but it leaves the weights alone
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attach_null_space(model, optimizer, spaces).remove()
    model.eval()
    with torch.no_grad():
        model(**RETAINED[1])
    with pytest.raises(ValueError, match="laid out for inference on a CPU.* Load it again"):
        attach_null_space(model, optimizer, spaces)


def test_asking_a_4_bit_model_leaves_its_weights_as_training_needs_them(saved_model):
    model, layer = four_bit_model(saved_model)
    with evaluating(model), torch.no_grad():
        assert layer.training and not model.training
        model(**RETAINED[1])
    spaces = fit_null_space(model, RETAINED, progress=False)
    attach_null_space(model, torch.optim.AdamW(trainable(model), lr=1e-2), spaces).remove()


OFFLOADED = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "cpu",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "disk",
    "model.language_model.layers.1": "cpu",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}
VISION_OFFLOADED = {
    "model.vision_tower": "disk",  # the model's first weights: inputs must not follow them to the meta device
    "model.multi_modal_projector": "disk",
    "model.language_model": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize(
    ("device_map", "target"),
    [
        (OFFLOADED, r".*vision_tower.*(fc1|fc2|q_proj|k_proj)"),  # gradients pass through layers that are on disk
        (OFFLOADED, r".*language_model\.layers\.1\..*_proj"),
        (VISION_OFFLOADED, r".*language_model\.layers\.1\..*_proj"),
    ],
)
def test_layers_offloaded_to_disk_change_nothing(tmp_path, device_map, target):
    tiny_llava().save_pretrained(tmp_path)

    def erase(**options):
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path, **options)
        offloaded = sum(weight.device.type == "meta" for weight in model.parameters())
        torch.manual_seed(1)
        model = get_peft_model(model, SpaceLoraConfig(r=3, target_modules=target))
        spaces = fit_null_space(model, RETAINED, progress=False)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        attach_null_space(model, optimizer, spaces)
        losses = train(model, optimizer, FORGET, steps=4)
        return offloaded, losses, measure_certificate(model, spaces, RETAINED, progress=False)

    offloaded, losses, certificate = erase(device_map=device_map, offload_folder=tmp_path / "offload")
    assert offloaded > 5
    none, expected, whole = erase()
    assert none == 0
    # Offloaded weights lie elsewhere in memory, sums may be split otherwise, and Adam divides by small gradients.
    assert losses == pytest.approx(expected, rel=1e-3)
    for layer, reference in zip(certificate.layers, whole.layers, strict=True):
        assert layer.relative_change == pytest.approx(reference.relative_change, rel=1e-3, abs=1e-12)
        assert layer.change <= layer.bound


def test_adapters_of_offloaded_layers_are_refused(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    model = get_peft_model(model, SpaceLoraConfig(r=3, target_modules=["down_proj"]))
    spaces = fit_null_space(model, RETAINED, progress=False)
    with pytest.raises(ValueError, match=r"lora_A of layer '.*layers\.0\.mlp\.down_proj' is on the meta device"):
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), spaces)


def test_float32_adapter_gives_no_warning(saved_model):
    model = load(saved_model, Setting(torch.bfloat16))
    spaces = fit_null_space(model, RETAINED, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), spaces)
