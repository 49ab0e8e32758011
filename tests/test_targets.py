"""Which layers each target adapts, on the embedded model and on models built from config."""

from collections import Counter

import architectures
import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from space_peft.modeling.layers import adapted_layers
from space_peft.modeling.targets import default_target_modules, side_of


def tiny_llava(vision_feature_layer):
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, vision_feature_layer=vision_feature_layer, image_token_id=39
        )
    )


def adapted(model, target):
    return set(
        adapted_layers(get_peft_model(model, LoraConfig(r=2, target_modules=default_target_modules(model, target))))
    )


def test_each_side_is_adapted_whole_and_alone():
    language = adapted(tiny_llava(-1), "language")
    assert len(language) == 2 * 7 and all(".language_model." in name for name in language)
    vision = adapted(tiny_llava(-1), "vision")
    assert len(vision) == 3 * 6 + 2
    assert {name.rsplit(".", 1)[-1] for name in vision if "projector" in name} == {"linear_1", "linear_2"}
    assert adapted(tiny_llava(-1), "all") == language | vision


def test_the_head_is_never_adapted():
    assert not any("lm_head" in name for target in ("language", "all") for name in adapted(tiny_llava(-1), target))


@pytest.mark.parametrize("layer, used", [(-2, 2), (2, 2), (-1, 3), (3, 3)])
def test_layers_the_model_never_reads_are_left_out(layer, used):
    vision = adapted(tiny_llava(layer), "vision")
    assert {int(name.split("layers.")[1].split(".")[0]) for name in vision if "layers." in name} == set(range(used))


def test_several_layers_of_the_tower_are_read():
    """With features of several layers, all up to the last of them count."""
    vision = adapted(tiny_llava([1, -2]), "vision")
    assert {int(name.split("layers.")[1].split(".")[0]) for name in vision if "layers." in name} == {0, 1}


# By part: how many linear layers each architecture's tiny model has there, by counting its layers by hand.
CLIP, LLAMA = 6, 7  # q, k, v, out, fc1, fc2; q, k, v, o, gate, up, down
PARTS = {
    "llava": {"vision_tower": 2 * CLIP, "multi_modal_projector": 2, "language_model": 2 * LLAMA},
    "llava_next": {"vision_tower": 2 * CLIP, "multi_modal_projector": 2, "language_model": 2 * LLAMA},
    "llava_onevision": {"vision_tower": 2 * CLIP, "multi_modal_projector": 2, "language_model": 2 * LLAMA},
    # qkv and proj in one each, and a merger of two layers
    "qwen2_vl": {"visual": 2 * 4 + 2, "language_model": 2 * LLAMA},
    "qwen2_5_vl": {"visual": 2 * 5 + 2, "language_model": 2 * LLAMA},
    # one deepstack merger besides the last one
    "qwen3_vl": {"visual": 3 * 4 + 2 + 2, "language_model": 2 * LLAMA},
    "idefics3": {"vision_model": 2 * CLIP, "connector": 1, "text_model": 2 * LLAMA},
    "internvl": {"vision_tower": 2 * CLIP, "multi_modal_projector": 2, "language_model": 2 * LLAMA},
    # without the tower's pooling head
    "paligemma": {"vision_tower": 2 * CLIP, "multi_modal_projector": 1, "language_model": 2 * LLAMA},
    # its projector is a bare matrix
    "gemma3": {"vision_tower": 2 * CLIP, "language_model": 2 * LLAMA},
    # a local and a global tower; one of the three language layers attends to the image
    "mllama": {"vision_model": 3 * CLIP, "multi_modal_projector": 1, "language_model": 3 * LLAMA},
}


@pytest.mark.parametrize("name", PARTS)
def test_every_architecture(name):
    def count(target):
        model, _ = architectures.build(name)
        names = adapted(model, target)
        assert all(key.startswith("model.") for key in names)
        assert {side_of(key) for key in names} == ({"vision", "language"} if target == "all" else {target})
        return dict(Counter(key.split(".")[1] for key in names))

    language = {part: n for part, n in PARTS[name].items() if part in ("language_model", "text_model")}
    assert count("language") == language
    assert count("vision") == {part: n for part, n in PARTS[name].items() if part not in language}
    assert count("all") == PARTS[name]


def test_unknown_target():
    with pytest.raises(ValueError, match="'vision', 'language' or 'all', got 'both'"):
        default_target_modules(tiny_llava(-1), "both")


def test_text_only_model_is_refused():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="not a multimodal model"):
        default_target_modules(model, "language")


def test_unknown_architecture_lists_its_linear_layers():
    model = tiny_llava(-1)
    model.model.brain = model.model.language_model
    del model.model.language_model
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration(.|\n)*brain\.layers\.\*\.mlp\.up_proj"):
        default_target_modules(model, "language")


@pytest.mark.parametrize("target", ["vision", "language", "all"])
def test_adapters_that_are_in_the_model_change_nothing(target):
    """What is adapted already would else be left out, and the adapter's own layers taken for the model's."""
    model = tiny_llava(-1)
    expected = default_target_modules(model, target)
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert default_target_modules(adapter.get_base_model(), target) == expected
