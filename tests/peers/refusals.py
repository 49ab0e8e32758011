"""What is known not to run as in PEFT, and why. Whatever is in none of the lists counts as a failure."""

from __future__ import annotations

import re


VARIANT = "a LoRA variant whose update is not s B A"
# Options of `LoraConfig` that `SpaceLoraConfig` refuses on purpose, each with what the message says after its name: the
# values that it may be refused for.
REFUSALS = {
    "use_dora": "is True",
    "use_qalora": "is True",
    "lora_bias": "is True",
    # The last is no value of PEFT either, which is what is tested.
    "bias": "is '(all|lora_only|invalid)'",
    "init_lora_weights": "is '(corda|eva|lora_ga|loftq|mica|(?i:olora)|pissa|pissa_niter_.*)'",
    "modules_to_save": r"is [\[({]",
    "trainable_token_indices": r"is [\[{]",
    "target_parameters": r"is [\[({']",
    "layer_replication": r"is [\[(]",
    "ensure_weight_tying": "is True",
    "corda_config": r"is CordaConfig\(",
    "eva_config": r"is EvaConfig\(",
    "lora_ga_config": r"is LoraGAConfig\(",
    "alora_invocation_tokens": f"asks for {VARIANT}",
    "arrow_config": f"asks for {VARIANT}",
    "kasa_config": f"asks for {VARIANT}",
    "monteclora_config": f"asks for {VARIANT}",
    "use_bdlora": f"asks for {VARIANT}",
    "velora_config": f"asks for {VARIANT}",
}

# What the tests want from the Hub and `models.py` does not build.
_ADAPTER = "a plain LoRA on the Hub: PEFT reads it with its own class, and ours refuses a folder that is not ours"
NOT_BUILT = {
    "hf-internal-testing/tiny-sd-pipe": "a whole diffusion pipeline",
    "hf-internal-testing/tiny-flux2": "a whole diffusion pipeline",
    "peft-internal-testing/tiny-random-gemma4-E2B": "used by tests of prefix tuning only",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "used by tests of prefix tuning only",
    "trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration": "a processor of images, which needs torchvision",
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": "a Mamba model",
    "tiiuae/falcon-mamba-tiny-dev": "a Mamba model",
    "hf-internal-testing/tiny-qwen3-moe": "weights that belong to an adapter on the Hub",
    "Qwen/Qwen2-0.5B": "not tiny: the test is about its vocabulary",
    "peft-internal-testing/opt-tokenizer-revision": "another revision of a tokenizer",
    "peft-internal-testing/tiny-random-BertModel": "another revision of the model",
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": _ADAPTER,
    "peft-internal-testing/gpt2-lora-random": _ADAPTER,
    "peft-internal-testing/mixtral-pre-v5-lora": _ADAPTER,
    "peft-internal-testing/opt-125m-dummy-lora": _ADAPTER,
    "peft-internal-testing/qwen3-moe-pre-v5-lora": _ADAPTER,
    "peft-internal-testing/test-lora-subfolder": _ADAPTER,
    "peft-internal-testing/tiny-OPTForCausalLM-lora": _ADAPTER,
    "peft-internal-testing/tiny-opt-lora-revision": _ADAPTER,
    "peft-internal-testing/tiny-random-BertModel-lora": _ADAPTER,
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": _ADAPTER,
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": _ADAPTER,
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": _ADAPTER,
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": _ADAPTER,
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": _ADAPTER,
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": _ADAPTER,
    "ybelkada/test-st-lora": _ADAPTER,
}

# Tests that ask for what is another way round here on purpose: by the function's name, the error and why.
_STOCK_CLASS = r"assert False\n \+  where False = isinstance\(LoraConfig\("
DIFFERS = {
    "test_from_pretrained_forward_compatible_load_from_peft_config": (
        _STOCK_CLASS,
        "`PeftConfig.from_pretrained` gives the stock class: what is saved loads without this package",
    ),
    "test_fixed_rank_lora_config": (_STOCK_CLASS, "`convert_to_lora` makes a plain LoRA of another adapter"),
}

# Files that say `LoraConfig` and are not run.
EXCLUDED = {
    "test_common_gpu.py": "needs a GPU",
    "test_gpu_examples.py": "needs a GPU",
    "test_gptqmodel.py": "needs a GPU",
    "test_torch_compile.py": "PEFT runs it only where PEFT_DEBUG_WITH_TORCH_COMPILE is set",
}


def refused_option(message: str) -> str | None:
    """The option of `REFUSALS` that a refusal of our config is about; `None` if it is not listed with that value."""
    found = re.match(r"`(\w+)` (.*)", message, re.DOTALL)
    if found and found[1] in REFUSALS and re.match(REFUSALS[found[1]], found[2], re.DOTALL):
        return found[1]
    return None
