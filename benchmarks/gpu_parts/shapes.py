"""Models of the sizes that people use, with random weights, and which of them a card has room for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from peft import get_peft_model
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)

from space_peft import SpaceLoraConfig
from space_peft.cli.plan import empty_model
from space_peft.demo import demo_model_path
from space_peft.null_space.planning import ErasurePlan, plan_erasure
from space_peft.null_space.workload import Workload


RANK, ROWS_A_STEP = 16, 16
# What a card holds beside what a plan counts: PyTorch's own, one forward pass while fitting, fragments.
_ROOM = 0.85
# A weight in 4 bits, with its share of the constants of its block, in bytes of one in bfloat16.
_QUANTISED = 0.27


@dataclass(frozen=True)
class Shape:
    """
    A LLaVA: a CLIP tower and a language model as Qwen2.5's.

    Args:
        name (`str`): What it is called.
        hidden, feed_forward, layers, heads, key_values, vocabulary (`int`): Of the language model.
        tower (`tuple[int, int, int, int]`): Width, feed-forward width, layers and heads of the tower.
        image (`int`): Side of a picture in pixels; a token each 14.
    """

    name: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_values: int
    vocabulary: int
    tower: tuple[int, int, int, int] = (1024, 4096, 24, 16)
    image: int = 336

    def config(self, processor) -> LlavaConfig:
        tokenizer = processor.tokenizer
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        width, wide, layers, heads = self.tower
        vision = CLIPVisionConfig(
            hidden_size=width, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=self.image, patch_size=14,
        )  # fmt: skip
        text = Qwen2Config(
            vocab_size=max(self.vocabulary, len(tokenizer)), hidden_size=self.hidden, intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_values, **special,
        )  # fmt: skip
        return LlavaConfig(
            vision_config=vision, text_config=text, image_seq_length=(self.image // 14) ** 2,
            image_token_index=processor.image_token_id, tie_word_embeddings=False,
        )  # fmt: skip

    def processor(self) -> LlavaProcessor:
        """The embedded model's tokenizer and template, and pictures of this shape's size."""
        processor = LlavaProcessor.from_pretrained(demo_model_path())
        processor.patch_size = 14
        processor.image_processor.size = processor.image_processor.crop_size = {
            "height": self.image,
            "width": self.image,
        }
        return processor


# Widths and depths of Qwen2.5-72B, -32B, -7B, -3B, -1.5B and -0.5B, and of something for a smoke test.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("72B", 8192, 29568, 80, 64, 8, 152064),
        Shape("32B", 5120, 27648, 64, 40, 8, 152064),
        Shape("7B", 3584, 18944, 28, 28, 4, 152064),
        Shape("3B", 2048, 11008, 36, 16, 2, 151936),
        Shape("1.5B", 1536, 8960, 28, 12, 2, 151936),
        Shape("0.5B", 896, 4864, 24, 14, 2, 151936),
        Shape("tiny", 64, 160, 2, 4, 2, 0, tower=(32, 64, 2, 2), image=28),
    )
}


@dataclass(frozen=True)
class Setting:
    """
    What is run on one shape.

    Args:
        shape (`str`): Its name.
        bits (`int`): 16, or 4 for weights that bitsandbytes has quantised.
        target_modules (`list[str]`): Layers that get the adapter, by the ends of their names.
        batch_size (`int`): Rows a forward pass; gradients add up to 16 rows a step.
        wanted (`str`): The shape that was asked for.
        said (`str`): What is smaller than asked for, and why; empty if nothing is.
    """

    shape: str
    bits: int
    target_modules: tuple[str, ...]
    batch_size: int
    wanted: str
    said: str = ""

    def to_dict(self) -> dict:
        return asdict(self)

    def adapter(self, constraint: str = "soft") -> SpaceLoraConfig:
        inside = r".*language_model.*\.(" + "|".join(self.target_modules) + ")"
        return SpaceLoraConfig(r=RANK, lora_alpha=2 * RANK, constraint=constraint, target_modules=inside)


_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings_for(wanted: str, bits: int, memory: float | None, rows: int) -> Iterator[Setting]:
    """What to try for a shape, the most like what was asked for first: fewer rows at a time, then without the layer whose
    statistics are largest, then a smaller shape. What the library's plan has no room for is left out.

    Args:
        wanted (`str`): The shape.
        bits (`int`): 16 or 4.
        memory (`float`, *optional*): Bytes of the device; `None` leaves out nothing.
        rows (`int`): Retained rows.
    """
    names = list(SHAPES)
    for name in names[names.index(wanted) :]:
        for modules in (_ALL, _ALL[:-1]):
            plan = None if memory is None else plan_of(Setting(name, bits, modules, 1, wanted), rows)
            for batch_size in (16, 8, 4, 2, 1):
                setting = Setting(name, bits, modules, batch_size, wanted)
                if plan is not None and needed(plan, bits, batch_size) > _ROOM * memory:
                    continue
                smaller = [] if name == wanted else [f"{wanted} was asked for, and this card has no room for it"]
                if len(modules) < len(_ALL):
                    smaller.append("down_proj is not adapted: its second moments have no room beside the weights")
                if batch_size < ROWS_A_STEP:
                    smaller.append(f"{batch_size} rows a pass, {ROWS_A_STEP // batch_size} passes a step")
                yield replace(setting, said="; ".join(smaller))


def plan_of(setting: Setting, rows: int, steps: int = 60, dtype: torch.dtype = torch.bfloat16) -> ErasurePlan:
    """The library's own plan of the setting, from the config alone."""
    shape = SHAPES[setting.shape]
    config = shape.config(shape.processor())
    model = get_peft_model(empty_model(config, dtype), setting.adapter())
    return plan_erasure(model, Workload.of(config, rows=rows, steps=steps, batch_size=setting.batch_size))


def needed(plan: ErasurePlan, bits: int, batch_size: int) -> float:
    """Bytes, the larger of fitting and training, of a plan for one row a pass and weights of 16 bits."""
    spared = 0.0 if bits == 16 else (1 - _QUANTISED) * plan.weights["language"]
    return max(plan.fitting, plan.training + (batch_size - 1) * plan.activations) - spared


def build(setting: Setting, device: str, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model of random weights on the device, and its processor."""
    shape = SHAPES[setting.shape]
    processor = shape.processor()
    torch.manual_seed(0)
    # On the host first where it is to be quantised, which is done while it is loaded from files.
    with torch.device("cpu" if setting.bits == 4 else device):
        model = LlavaForConditionalGeneration._from_config(shape.config(processor), dtype=dtype)
    if setting.bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = LlavaForConditionalGeneration.from_pretrained(
                folder, quantization_config=quantisation, dtype=dtype, device_map={"": device}
            )
    return model.eval(), processor
