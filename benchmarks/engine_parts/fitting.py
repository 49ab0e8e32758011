"""The statistics pass against a bare forward pass, and against PEFT's activation-based initialisations."""

from __future__ import annotations

import warnings

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from space_peft import SpaceLoraConfig, fit_null_space
from space_peft.modeling.layers import deployed_model
from space_peft.null_space.fitting import collect_moments

from .timing import in_turns


IMAGE_TOKEN = 31999
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def text_config(hidden: int, layers: int) -> LlamaConfig:
    """Proportions of an 8B Llama: feed-forward 3.5 times as wide, a quarter as many key-value heads."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=int(3.5 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        pad_token_id=0,
    )


def llava(hidden: int, layers: int, image: int) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights: a CLIP tower of half the width, image / 14 squared visual tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=hidden // 2,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        image_size=image,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(hidden, layers),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(image // 14) ** 2,
    )
    return LlavaForConditionalGeneration(config).eval()


def image_batches(image: int, count: int, rows: int, device: str) -> list[dict]:
    tokens = (image // 14) ** 2
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        # A short question and its answer beside the image, as in visual question answering.
        ids = torch.randint(1, 31000, (rows, tokens + 32), generator=generator)
        ids[:, :tokens] = IMAGE_TOKEN
        pixels = torch.randn(rows, 3, image, image, generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches


def text_batches(count: int, rows: int, length: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 31000, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


def statistics_ratios(smoke: bool, device: str) -> dict:
    hidden, layers, image, count, rows = (128, 2, 56, 2, 2) if smoke else (1024, 4, 336, 2, 4)
    config = SpaceLoraConfig(r=8, target_modules=r".*language_model.*\.(" + "|".join(LINEAR) + ")")
    model = get_peft_model(llava(hidden, layers, image).to(device), config)
    batches = image_batches(image, count, rows, device)

    @torch.no_grad()
    def bare():
        with deployed_model(model):
            for batch in batches:
                model(**batch, logits_to_keep=1)

    results = {}
    for name, per_row in (("default", config.tokens_per_row), ("every_token", None)):
        options = {"tokens_per_row": per_row, "dtype": torch.float32, "progress": False}
        results[name] = in_turns(
            lambda options=options: collect_moments(model, batches, **options), bare, 1 if smoke else 7
        )
        print(name, results[name], flush=True)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    shape = {"hidden": hidden, "layers": layers, "tokens": tokens, "adapted": "all linear layers of the language model"}
    return {"fit_ratio": results["default"]["ratio"], "fit": {**results, "model": shape}}


class Initialisations:
    """One Llama, one set of batches (of one row, as CorDA wants them), and three ways to look at its activations."""

    def __init__(self, hidden: int, layers: int, count: int, length: int):
        self.shape = {"hidden": hidden, "layers": layers, "tokens": count * length}
        self._config = text_config(hidden, layers)
        self._batches = text_batches(count, 1, length)
        self._model = get_peft_model(self._fresh(), SpaceLoraConfig(r=16, target_modules=LINEAR))

    def _fresh(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(self._config).eval()

    def ours(self) -> None:
        """Statistics and decomposition."""
        fit_null_space(self._model, self._batches, progress=False)

    def eva(self):
        """PEFT's EVA: incremental singular value decompositions until they converge."""
        config = LoraConfig(r=16, target_modules=LINEAR, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(self._fresh(), config, low_cpu_mem_usage=True)
        return lambda: initialize_lora_eva_weights(model, self._batches, show_progress_bar=False)

    def corda(self):
        """PEFT's CorDA: a covariance and a decomposition for each layer."""
        model = self._fresh()
        options = CordaConfig(corda_method="kpm")
        config = LoraConfig(r=16, target_modules=LINEAR, init_lora_weights="corda", corda_config=options)

        @torch.no_grad()
        def run():
            for batch in self._batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1)

        return lambda: preprocess_corda(model, config, run_model=run)


def against_peft(smoke: bool) -> dict:
    """Whole initialisations, decomposition included. EVA's model is small: it takes some hundred times as long."""
    repeats = 1 if smoke else 5
    small = Initialisations(128, 2, 4, 64)
    large = small if smoke else Initialisations(512, 4, 24, 256)
    results = {
        "eva": {**in_turns(small.ours, small.eva(), repeats), "model": small.shape},
        "corda": {**in_turns(large.ours, large.corda(), repeats), "model": large.shape},
    }
    print(results, flush=True)
    return {
        "fit_vs_eva": results["eva"]["ratio"],
        "fit_vs_corda": results["corda"]["ratio"],
        "fit_vs_peft": results,
    }


def measure(smoke: bool, device: str) -> dict:
    return {**statistics_ratios(smoke, device), **against_peft(smoke)}
