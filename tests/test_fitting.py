"""Fitting null spaces to a model: which inputs count, and that the model is left as it was."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import IMAGE_TOKEN, image_batch, text_batch, tiny_llama, tiny_llava

from space_peft.config import SpaceLoraConfig
from space_peft.null_space.fitting import collect_moments, fit_null_space


def adapted(model, **settings):
    return get_peft_model(model, SpaceLoraConfig(**{"r": 2, "target_modules": "all-linear", **settings}))


def test_layers_with_the_same_input_share_a_fitter():
    moments = collect_moments(adapted(tiny_llama()), [text_batch(), text_batch(seed=1)], progress=False)
    by_fitter = {}
    for name, fitter in moments.items():
        by_fitter.setdefault(id(fitter), set()).add(name.removeprefix("model.layers."))
    expected = []
    for i in range(2):
        expected.append({f"{i}.self_attn.{x}_proj" for x in "qkv"})
        expected += [{f"{i}.self_attn.o_proj"}, {f"{i}.mlp.gate_proj", f"{i}.mlp.up_proj"}, {f"{i}.mlp.down_proj"}]
    assert sorted(map(sorted, by_fitter.values())) == sorted(map(sorted, expected))
    assert all(fitter.counts == {"text": 80} for fitter in moments.values())


class Branching(torch.nn.Module):
    """Two layers that are given the same tensor, or not."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

    def forward(self, x, mode):
        if mode == "changed in place":
            first = self.one(x)
            return first + self.two(x.add_(1.0))
        return self.one(x) + self.two(x if mode == "same" else x.clone())


def test_sharing_is_by_identity_and_checked_in_every_batch():
    def collect(*modes):
        model = get_peft_model(Branching(), SpaceLoraConfig(r=1, target_modules=["one", "two"]))
        return collect_moments(model, [{"x": torch.ones(2, 6), "mode": mode} for mode in modes], progress=False)

    same = collect("same", "same")
    assert same["one"] is same["two"] and same["one"].counts == {"image": 4}
    apart = collect("equal", "same")
    assert apart["one"] is not apart["two"] and apart["two"].counts == {"image": 4}
    changed = collect("changed in place")
    assert float(changed["one"].second_moment()[0, 0]) == 1.0 and float(changed["two"].second_moment()[0, 0]) == 4.0
    with pytest.raises(RuntimeError, match="'one' and 'two' were given the same input in an earlier batch"):
        collect("same", "equal")


def test_moments_are_those_of_the_deployed_model_and_leave_it_as_it_was():
    """Reference: the hidden states that the base model itself returns, and a plain hook on one inner layer."""
    batch = text_batch(rows=4, length=9, pad=3)
    model = adapted(tiny_llama(), lora_dropout=0.5, init_lora_weights=False)
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_A.default.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)  # draws a random number when it starts
    random_state = torch.get_rng_state()
    moments = collect_moments(model, loader, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    base, seen = tiny_llama(), []
    base.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    rows = seen[0][batch["attention_mask"].bool()].double()
    fitter = moments["model.layers.1.mlp.down_proj"]
    assert fitter.counts == {"text": 30}
    torch.testing.assert_close(fitter.second_moment(), rows.T @ rows / len(rows), rtol=1e-6, atol=1e-9)


def test_padding_of_a_batch_does_not_change_the_fit():
    model = adapted(tiny_llama())
    long, short = text_batch(1, 9, seed=1), text_batch(1, 6, seed=2)
    padded = {
        "input_ids": torch.cat([long["input_ids"], torch.nn.functional.pad(short["input_ids"], (0, 3))]),
        "attention_mask": torch.cat([long["attention_mask"], torch.nn.functional.pad(short["attention_mask"], (0, 3))]),
    }
    together = collect_moments(model, [padded], progress=False)
    apart = collect_moments(model, [long, short], progress=False)
    for name in apart:
        assert together[name].counts == apart[name].counts == {"text": 15}
        torch.testing.assert_close(
            together[name].second_moment(), apart[name].second_moment(), rtol=1e-4, atol=1e-6, msg=name
        )


def test_image_and_text_tokens_are_counted_apart():
    model = adapted(tiny_llava())
    batches = [image_batch(rows=3, text=5), text_batch(rows=2, length=7)]
    moments = collect_moments(model, batches, progress=False)
    language = moments["model.language_model.layers.0.mlp.gate_proj"]
    assert language.counts == {"image": 12, "text": 15 + 14}
    vision = next(fitter for name, fitter in moments.items() if "vision_tower" in name and "q_proj" in name)
    assert vision.counts == {"image": 3 * 5}  # 4 patches and the class token
    projector = moments["model.multi_modal_projector.linear_1"]
    assert projector.counts == {"image": 12}
    other = collect_moments(model, batches, image_token_id=IMAGE_TOKEN - 1, progress=False)
    assert other["model.language_model.layers.0.mlp.gate_proj"].counts.get("image", 0) != 12


def test_vision_tokens_are_not_masked_even_if_there_are_as_many_as_text_tokens():
    batch = image_batch(rows=3, text=1)  # 5 tokens of text and image, 4 patches and the class token
    batch["attention_mask"][0, -1] = 0
    moments = collect_moments(adapted(tiny_llava()), [batch], progress=False)
    vision = next(fitter for name, fitter in moments.items() if "vision_tower" in name and "q_proj" in name)
    assert vision.counts == {"image": 15}
    assert moments["model.language_model.layers.0.mlp.gate_proj"].counts == {"image": 12, "text": 2}


def test_pooled_statistics_reach_the_fitters():
    moments = collect_moments(adapted(tiny_llava()), [image_batch(rows=3)], statistics="pooled", progress=False)
    assert all(set(fitter.counts.values()) == {3} for fitter in moments.values())
    spaces = fit_null_space(adapted(tiny_llava(), statistics="pooled"), [image_batch(rows=3)], progress=False)
    assert all(space.statistics == "pooled" for space in spaces.values())


def test_settings_of_the_adapter_are_used_per_layer():
    model = adapted(tiny_llama(), constraint="hard", energy=0.8, max_rank=5, rank_pattern={"q_proj": 4})
    spaces = fit_null_space(model, [text_batch()], progress=False)
    assert len(spaces) == 14 and len({id(space) for space in spaces.values()}) == 8
    assert all((space.constraint, space.energy) == ("hard", 0.8) and space.rank <= 5 for space in spaces.values())


def test_add_adapter_gives_the_same_null_spaces_as_get_peft_model():
    model = tiny_llama()
    model.add_adapter(SpaceLoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    ours = fit_null_space(model, [text_batch()], progress=False)
    reference = fit_null_space(adapted(tiny_llama(), target_modules=["q_proj", "down_proj"]), [text_batch()])
    assert list(ours) == list(reference)
    assert all(torch.equal(ours[name].eigenvectors, reference[name].eigenvectors) for name in ours)


def test_output_layer_sees_every_position():
    model = adapted(tiny_llama(), target_modules=["lm_head", "q_proj"])
    moments = collect_moments(model, [text_batch()], progress=False)
    assert moments["lm_head"].counts == {"text": 40}


def test_a_null_space_smaller_than_the_rank_is_refused():
    model = adapted(tiny_llama(), constraint="hard", energy=1.0, r=8, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0.*d = 48 .* k = 4\d, .*r = 8.*Lower energy"):
        fit_null_space(model, [text_batch(rows=30)], progress=False)


def test_layers_without_data_are_named():
    with pytest.raises(ValueError, match=r"saw no retained data, the first is 'model\.vision_tower"):
        fit_null_space(adapted(tiny_llava()), [text_batch()], progress=False)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "the dataloader gave no batch"),
        ([torch.zeros(2, 3)], TypeError, "a batch is a Tensor"),
    ],
)
def test_bad_retained_data(batches, error, message):
    with pytest.raises(error, match=message):
        fit_null_space(adapted(tiny_llama()), batches, progress=False)


def test_nan_in_the_model_names_the_layer_and_restores_it():
    model = adapted(tiny_llama())
    model.get_base_model().model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn\.q_proj' contain NaN"):
        fit_null_space(model, [text_batch()], progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(getattr(module, "disable_adapters", False) is True for module in model.modules())


def test_other_models_and_adapters_are_refused():
    from peft import LoraConfig

    with pytest.raises(ValueError, match="no adapter 'default'"):
        fit_null_space(tiny_llama(), [text_batch()])
    with pytest.raises(TypeError, match="expected a SpaceLoraConfig"):
        fit_null_space(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), [text_batch()])
    with pytest.raises(TypeError, match="only linear layers"):
        fit_null_space(adapted(tiny_llama(), target_modules=["embed_tokens"]), [text_batch()])
    model = adapted(tiny_llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        fit_null_space(model, [text_batch()], progress=False)
