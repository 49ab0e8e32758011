"""A tiny model with its real processor class for every architecture the library supports.

Nothing comes from the Hub: the models are built from their configs, and the processors from their parts, which are the
real image processor (PIL backend, small sizes) and a word-level tokenizer with the architecture's own special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import transformers
from run_unchanged import VIDEO_BASE, base_of_video_processors
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

from space_peft.data.questions import DEFAULT_QUESTIONS


# Without torchvision transformers does not export the base class that processors with a video part check it against, and
# such a processor could not even be made to look at images. No video is processed here.
if not transformers.utils.is_torchvision_available():
    setattr(transformers.processing_utils.transformers_module, VIDEO_BASE, base_of_video_processors())

NAMES = ("red fox", "wolf", "owl", "apple")
SIDE, PATCH = 16, 4  # of a tile, in pixels
PATCHES = (SIDE // PATCH) ** 2
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
EXTRA = ("question", "answer", "What", "colour", "is", "a", "an", "the", "leaf", "?", "green", "grey", "animal", "kind")


def build_tokenizer(special: dict[str, str], more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Words, signs and line breaks of the questions; `special` names further special tokens by attribute."""
    sign = r"\n|\w+|[^\w\s]"
    texts = [*DEFAULT_QUESTIONS.naming, *DEFAULT_QUESTIONS.confirm, *NAMES, *EXTRA, "Yes No", "\n", ":"]
    words = sorted({word for text in texts for word in re.findall(sign, text.replace("{name}", " "))})
    # Special tokens last: Mllama's image token is the first id its output head has no row for.
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *words, *more, *special.values()]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(sign), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*more, *special.values())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=special,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def chat_template(image: str, bos: str = "<s>") -> str:
    """Turns as `question: ...` and `answer: ...</s>`, an image where its block stands."""
    return (
        bos + "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}answer: {% else %}question: {% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}answer:{% endif %}"
    )


def square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


def text_config(tokenizer, **more) -> dict:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {**TEXT, **special, "vocab_size": len(tokenizer), **more}


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights as large as a trained model's: in a fresh one the image hardly reaches the answer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter.shape[1:].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            elif "gate" in name:  # Mllama's: closed in a fresh model
                parameter.fill_(0.7)
    return model.eval()


# LLaVA reads the second-to-last of its layers.
CLIP_TOWER = {
    **TOWER,
    "num_hidden_layers": 3,
    "model_type": "clip_vision_model",
    "image_size": SIDE,
    "patch_size": PATCH,
}


def llava():
    tokenizer = build_tokenizer({"image_token": "<image>"})
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size=square(), crop_size=square(), do_center_crop=False),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    config = transformers.LlavaConfig(
        vision_config=CLIP_TOWER,
        text_config={**text_config(tokenizer), "model_type": "llama"},
        image_token_id=tokenizer.image_token_id,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def llava_next():
    tokenizer = build_tokenizer({"image_token": "<image>"})
    processor = transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square(), image_grid_pinpoints=PINPOINTS),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    config = transformers.LlavaNextConfig(
        vision_config=CLIP_TOWER,
        text_config={**text_config(tokenizer), "model_type": "llama"},
        image_token_id=tokenizer.image_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    tokenizer = build_tokenizer({"image_token": "<image>", "video_token": "<video>"})
    processor = transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=square(), image_grid_pinpoints=PINPOINTS),
        tokenizer,
        BaseVideoProcessor(),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>"),
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={**text_config(tokenizer), "model_type": "qwen2"},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
# Any size is a grid of patches to Qwen; this one gives 4 x 4 patches, merged to 2 x 2 tokens.
QWEN_PIXELS = {"min_pixels": 16 * 16, "max_pixels": 24 * 24}


def _qwen(name: str, vision: dict, rope: dict):
    tokenizer = build_tokenizer(QWEN_TOKENS)
    processor = getattr(transformers, f"{name}Processor")(
        Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, **QWEN_PIXELS),
        tokenizer,
        BaseVideoProcessor(),
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    tokens = {f"{key}_id": tokenizer.convert_tokens_to_ids(token) for key, token in QWEN_TOKENS.items()}
    config = getattr(transformers, f"{name}Config")(
        text_config={**text_config(tokenizer), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **rope}},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, **vision},
        **tokens,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def qwen2_vl():
    return _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2}, {"mrope_section": [2, 2, 2]})


def qwen2_5_vl():
    vision = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 24, "window_size": 16}
    return _qwen("Qwen2_5_VL", {**vision, "fullatt_block_indexes": [1]}, {"mrope_section": [2, 2, 2]})


def qwen3_vl():
    vision = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 24, "num_position_embeddings": 16}
    rope = {"mrope_section": [2, 2, 2], "mrope_interleaved": True}
    # One layer of the tower feeds one of the language model, and what only its last one gets no answer reads.
    return _qwen("Qwen3VL", {**vision, "depth": 3, "deepstack_visual_indexes": [0]}, rope)


IDEFICS_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def _idefics(name: str, image_processor, *parts):
    cells = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    tokenizer = build_tokenizer(IDEFICS_TOKENS | ({"video_token": "<video>"} if parts else {}), cells)
    processor = getattr(transformers, f"{name}Processor")(
        # Images are made 32 pixels long and cut into tiles of 16, with a small copy of the whole at the end.
        image_processor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        tokenizer,
        *parts,
        image_seq_len=PATCHES // 4,
        chat_template=chat_template("<image>"),
    )
    config = getattr(transformers, f"{name}Config")(
        vision_config={**TOWER, "image_size": SIDE, "patch_size": PATCH},
        text_config={**text_config(tokenizer), "model_type": "llama"},
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,  # Older versions of transformers generate with the default, 128,002.
        scale_factor=2,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def idefics3():
    return _idefics("Idefics3", Idefics3ImageProcessorPil)


def smolvlm():
    return _idefics("SmolVLM", SmolVLMImageProcessorPil, BaseVideoProcessor())


def internvl():
    tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = build_tokenizer({**tokens, "video_token": "<video>"})
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=square(), max_patches=4),
        tokenizer,
        BaseVideoProcessor(),
        image_seq_length=PATCHES // 4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    config = transformers.InternVLConfig(
        vision_config={**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config={**text_config(tokenizer), "model_type": "qwen2"},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=PATCHES // 4,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def paligemma():
    tokenizer = build_tokenizer({"image_token": "<image>"})
    image_processor = SiglipImageProcessorPil(size=square())
    image_processor.image_seq_length = PATCHES
    processor = transformers.PaliGemmaProcessor(
        # The processor itself writes the BOS token, behind the image.
        image_processor,
        tokenizer,
        chat_template=chat_template("<image>", bos=""),
    )
    config = transformers.PaliGemmaConfig(
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 24,
        },
        text_config={**text_config(tokenizer), "model_type": "gemma", "head_dim": 12},
        image_token_index=tokenizer.image_token_id,
        projection_dim=24,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def gemma3():
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = build_tokenizer(tokens)
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=square()),
        tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    config = transformers.Gemma3Config(
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={**text_config(tokenizer), "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 64},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def mllama():
    tokenizer = build_tokenizer({"image_token": "<|image|>"}, ("<|python_tag|>",))
    processor = transformers.MllamaProcessor(
        MllamaImageProcessorPil(size=square(), max_image_tiles=4),
        tokenizer,
        chat_template=chat_template("<|image|>"),
    )
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH, "max_num_tiles": 4, "supported_aspect_ratios": ratios,
        "intermediate_layers_indices": [1], "vision_output_dim": 32,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = text_config(tokenizer, num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=rope)
    # As published: the head has no row for the image token, whose embedding lies behind the vocabulary.
    text["vocab_size"] = tokenizer.image_token_id
    config = transformers.MllamaConfig(
        vision_config=tower, text_config=text, image_token_index=tokenizer.image_token_id
    )
    return transformers.MllamaForConditionalGeneration(config), processor


ARCHITECTURES: dict[str, Callable] = {
    build.__name__: build
    for build in (
        llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, internvl, paligemma,
        gemma3, mllama,
    )
}  # fmt: skip


def build(name: str, seed: int = 0):
    """`(model, processor)`; the same weights whenever the seed is the same."""
    torch.manual_seed(seed)
    model, processor = ARCHITECTURES[name]()
    return enliven(model, seed), processor


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config(build_tokenizer({}))))


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text_config(build_tokenizer({}))))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text_config(build_tokenizer({})), head_dim=12))


TEXT_ONLY: dict[str, Callable] = {build.__name__: build for build in (llama, qwen2, qwen3)}


def build_text_only(name: str, seed: int = 0):
    """A causal language model of the same size, and its tokenizer."""
    torch.manual_seed(seed)
    return enliven(TEXT_ONLY[name](), seed), build_tokenizer({})
