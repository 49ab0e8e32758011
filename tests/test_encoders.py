"""The shared spaces: each encoder on a real (tiny) model with a real tokenizer and image processor."""

import numpy as np
import pytest
import torch
from architectures import build
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from space_peft.anchors import CaptionEncoder, DualEncoder, Encoder, OwnSpaceEncoder
from space_peft.anchors.encoders import resolve_encoder
from space_peft.demo import load_demo_model
from space_peft.modeling.features import multimodal_core, tap_image_features
from space_peft.modeling.prompts import answer_logits, build_batch


WORDS = "[PAD] [UNK] [EOS] a an photo image picture of the fox wolf red car . wild animal".split()
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def word_tokenizer(limit=16):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_max_length=limit,
        model_input_names=["input_ids", "attention_mask"],
    )


def text_config(**more):
    return {
        **SMALL,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "eos_token_id": 2,
        **more,
    }


def clip_encoder(seed=0):
    torch.manual_seed(seed)
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text_config(), vision_config=vision, projection_dim=12))
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return DualEncoder(model, CLIPProcessor(CLIPImageProcessorPil(**size), word_tokenizer()))


def siglip_encoder(seed=0):
    torch.manual_seed(seed)
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text_config(), vision_config=vision))
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return DualEncoder(model, SiglipProcessor(images, word_tokenizer()))


def caption_encoder(seed=0):
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**text_config(), hidden_dropout_prob=0.5))
    return CaptionEncoder(model, word_tokenizer())


def pictures(n=5, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(p).convert(mode) for p in pixels]


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def own(demo):
    return OwnSpaceEncoder(*demo)


def check_rows(vectors, n):
    assert vectors.dtype == torch.float32 and vectors.ndim == 2 and len(vectors) == n
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(n), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [clip_encoder, siglip_encoder])
def test_dual_encoders_share_one_space(make):
    encoder = make()
    assert isinstance(encoder, Encoder) and encoder.reads == "image"
    images, texts = (
        encoder.embed_images(pictures()),
        encoder.embed_texts(["a fox", "a red car", "wild animal of the wolf"]),
    )
    check_rows(images, 5)
    check_rows(texts, 3)
    assert images.shape[1] == texts.shape[1]


@pytest.mark.parametrize("make", [clip_encoder, siglip_encoder])
def test_dual_encoder_agrees_with_the_models_own_logits(make):
    encoder = make()
    model, processor = encoder.model.eval(), encoder.processor
    texts, images = ["a fox", "the red car"], pictures(3)
    inputs = processor(text=texts, images=images, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    bias = getattr(model, "logit_bias", torch.zeros(()))
    expected = (output.logits_per_image - bias) / model.logit_scale.exp()
    got = encoder.embed_images(images) @ encoder.embed_texts(texts).T
    torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [clip_encoder, siglip_encoder, caption_encoder])
def test_batching_and_overlong_texts_change_nothing(make):
    encoder = make()
    texts = ["fox", "a red car", "the wolf " * 50]
    together = encoder.embed_texts(texts)
    alone = torch.cat([encoder.embed_texts([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_caption_encoder_ignores_padding_and_images():
    encoder = caption_encoder()
    encoder.model.train()
    vectors = encoder.embed_texts(["a fox", "a fox"])
    check_rows(vectors, 2)
    assert torch.equal(vectors[0], vectors[1]), "dropout was on while embedding"
    assert encoder.model.training, "training mode was not restored"
    with pytest.raises(TypeError, match="embeds captions"):
        encoder.embed_images(pictures(1))


def test_own_space_is_mean_of_projected_tokens_and_word_embeddings(demo, own):
    model, processor = demo
    check_rows(own.embed_images(pictures(3)), 3)
    with torch.no_grad():
        pixels = processor.image_processor(pictures(3), return_tensors="pt")["pixel_values"]
        tokens = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    expected = torch.nn.functional.normalize(tokens.mean(dim=1), dim=1)
    torch.testing.assert_close(own.embed_images(pictures(3)), expected, atol=1e-5, rtol=0)
    ids = processor.tokenizer("fox", add_special_tokens=False)["input_ids"]
    words = model.get_input_embeddings().weight[ids].mean(dim=0).detach()
    torch.testing.assert_close(own.embed_texts(["fox"])[0], words / words.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "I;16"])
def test_own_space_takes_any_image_mode(own, mode):
    image = pictures(1, mode="L" if mode == "I;16" else mode)[0]
    image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 256) if mode == "I;16" else image
    check_rows(own.embed_images([image]), 1)


def test_own_space_features_by_tile_are_gathered_by_image(demo, own, monkeypatch):
    """Architectures that cut images into tiles return more features than images."""
    core = multimodal_core(demo[0])
    original = core.get_image_features

    def tiled(pixel_values, **kwargs):
        output = original(pixel_values=pixel_values, **kwargs)
        output.pooler_output = [half for tokens in output.pooler_output for half in tokens.chunk(2)]
        return output

    expected = own.embed_images(pictures(3))
    monkeypatch.setattr(core, "get_image_features", tiled, raising=False)
    torch.testing.assert_close(own.embed_images(pictures(3)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "llava_next", "internvl", "mllama"])
def test_own_space_of_other_architectures(name):
    """Patches in one sequence (Qwen), tiles in one or in nested lists, features that are attended to (Mllama)."""
    model, processor = build(name)
    encoder = OwnSpaceEncoder(model, processor)
    images = [image.resize((20 + 12 * i, 24)) for i, image in enumerate(pictures(3))]
    together = encoder.embed_images(images)
    check_rows(together, 3)
    torch.testing.assert_close(together, torch.cat([encoder.embed_images([image]) for image in images]))
    assert torch.pdist(together).min() > 1e-4, "different images, different embeddings"
    assert encoder.embed_texts(["a fox"]).shape == (1, together.shape[1])


def test_own_space_sees_what_the_model_is_shown():
    """InternVL's processor cuts images into tiles; its image processor alone, by default, does not."""
    model, processor = build("internvl")
    image = pictures(1)[0].resize((48, 20))
    assert len(processor.image_processor([image])["pixel_values"]) == 1
    batch = build_batch(processor, ["What is this?"], images=[image])
    assert len(batch["pixel_values"]) > 1
    with torch.no_grad(), tap_image_features(model) as features:
        answer_logits(model, build_batch(processor, ["What is this?"], images=[image], answers=["owl"]))
    expected = torch.nn.functional.normalize(features[0], dim=-1)
    torch.testing.assert_close(OwnSpaceEncoder(model, processor).embed_images([image]), expected)


def test_own_space_while_features_are_tapped(demo, own):
    with tap_image_features(demo[0]) as collected:
        check_rows(own.embed_images(pictures(2)), 2)
    assert collected[0].shape[0] == 2


def test_own_space_through_an_adapter(demo):
    from peft import LoraConfig, get_peft_model

    model, processor = load_demo_model()
    before, mark = (
        OwnSpaceEncoder(model, processor).embed_images(pictures()),
        OwnSpaceEncoder(model, processor).fingerprint,
    )
    targets = "|".join(
        name for name, m in model.named_modules() if "multi_modal_projector" in name and hasattr(m, "in_features")
    )
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    encoder = OwnSpaceEncoder(adapted, processor)
    assert (encoder.embed_images(pictures()) - before).abs().max() > 1e-3
    on = encoder.fingerprint
    with adapted.disable_adapter():
        torch.testing.assert_close(encoder.embed_images(pictures()), before, atol=1e-6, rtol=0)
        assert encoder.fingerprint != on, "switching the adapter off changes the embeddings, so the fingerprint too"
    assert encoder.fingerprint == on != mark


def test_own_space_text_from_a_hidden_layer(demo, own):
    first = OwnSpaceEncoder(*demo, text_layer=0)
    torch.testing.assert_close(first.embed_texts(["fox"]), own.embed_texts(["fox"]), atol=1e-5, rtol=0)
    middle = OwnSpaceEncoder(*demo, text_layer=2)
    check_rows(middle.embed_texts(["fox", "wolf"]), 2)
    assert middle.fingerprint != own.fingerprint


def test_fingerprint_follows_weights_and_not_the_object():
    one, two = clip_encoder(), clip_encoder()
    assert one.fingerprint == two.fingerprint != clip_encoder(seed=1).fingerprint
    with torch.no_grad():
        two.model.vision_model.embeddings.patch_embedding.weight[0, 0, 0, 0] += 1e-3
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint != siglip_encoder().fingerprint


def test_name_does_not_publish_a_local_path(own):
    assert "/" not in own.name and "Llava" in own.name


def test_encoder_is_chosen_by_the_model(demo):
    assert isinstance(resolve_encoder(*demo, None), OwnSpaceEncoder)
    clip = clip_encoder()
    assert isinstance(resolve_encoder(clip.model, clip.processor, None), DualEncoder)
    assert resolve_encoder(*demo, clip) is clip


def test_what_cannot_encode_is_refused(demo):
    from tiny_models import tiny_llama

    model, processor = demo
    text_only = tiny_llama()
    assert isinstance(text_only, LlamaForCausalLM)
    with pytest.raises(ValueError, match="not a multimodal model"):
        resolve_encoder(text_only, processor, None)
    with pytest.raises(ValueError, match="no tokenizer and no image_processor"):
        resolve_encoder(model, processor.tokenizer, None)
    with pytest.raises(ValueError, match="no image token"):
        resolve_encoder(model, clip_encoder().processor, None)
    for arguments in ((None, None), (model, None), (None, processor)):
        with pytest.raises(ValueError, match="give `model` and `processor`, or an `encoder`"):
            resolve_encoder(*arguments, None)
    with pytest.raises(TypeError, match="has no name"):
        resolve_encoder(None, None, object())
    with pytest.raises(ValueError, match="not a dual encoder"):
        DualEncoder(model, processor)
