"""What is known not to run as in PEFT, and why. Whatever is in none of the lists counts as a failure."""

from __future__ import annotations

import re
from collections.abc import Collection


VARIANT = "its update is not s B A"
_ASKS = "asks for a LoRA variant whose update is not s B A"
_INIT = "changes base weights or depends on data"
_BIAS = "a trained bias changes every output, retained ones included"
_NOT_LINEAR = "what it trains is not a linear layer with known inputs"
# Options of `LoraConfig` that `SpaceLoraConfig` refuses on purpose: by what the message says of them, why. Every entry
# must be met by the whole run, or the list says what is not so any more.
REFUSALS = {
    ("use_dora", "is True"): "DoRA's magnitude rescales the whole weight",
    ("lora_bias", "is True"): _BIAS,
    ("bias", "is 'all'"): _BIAS,
    ("bias", "is 'lora_only'"): _BIAS,
    ("bias", "is 'invalid'"): "no value of PEFT either, which is what is tested; ours says so earlier",
    ("init_lora_weights", "is 'corda'"): _INIT,
    ("init_lora_weights", "is 'eva'"): _INIT,
    ("init_lora_weights", "is 'lora_ga'"): _INIT,
    ("init_lora_weights", "is 'mica'"): _INIT,
    ("init_lora_weights", "is '(?i:olora)'"): _INIT,
    ("init_lora_weights", "is 'pissa'"): _INIT,
    ("init_lora_weights", "is 'pissa_niter_"): _INIT,
    ("modules_to_save", r"is [\[({]"): "those modules would train without the constraint",
    ("trainable_token_indices", r"is [\[{]"): _NOT_LINEAR,
    ("target_parameters", r"is [\[({']"): _NOT_LINEAR,
    ("layer_replication", r"is [\[(]"): "a copied layer shares its base weight with one that has other inputs",
    ("ensure_weight_tying", "is True"): "a tied weight is used with inputs of another layer",
    ("corda_config", r"is CordaConfig\("): _INIT,
    ("eva_config", r"is EvaConfig\("): _INIT,
    ("lora_ga_config", r"is LoraGAConfig\("): _INIT,
    ("alora_invocation_tokens", _ASKS): VARIANT,
    ("arrow_config", _ASKS): VARIANT,
    ("kasa_config", _ASKS): VARIANT,
    ("monteclora_config", _ASKS): VARIANT,
    ("use_bdlora", _ASKS): VARIANT,
    ("velora_config", _ASKS): VARIANT,
}

# What the tests want from the Hub and `models.py` does not build.
_ADAPTER = "a plain LoRA on the Hub: PEFT reads it with its own class, and ours refuses a folder that is not ours"
NOT_BUILT = {
    "hf-internal-testing/tiny-sd-pipe": "a whole diffusion pipeline",
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


def refusal(message: str) -> str | None:
    """The entry of `REFUSALS` that a refusal of our config is about, with its reason; `None` if there is none."""
    found = re.match(r"`(\w+)` (.*)", message, re.DOTALL)
    for (option, value), why in REFUSALS.items():
        if found and found[1] == option and re.match(value, found[2], re.DOTALL):
            return _line(option, value, why)
    return None


def _line(option: str, value: str, why: str) -> str:
    return f"{option} {value}: {why}"


def not_met(results: Collection[dict]) -> list[str]:
    """Entries of the lists that no test of a whole run has met.

    Args:
        results (list of `dict`): What became of every test, each with "outcome" and "detail".
    """
    met = {(result["outcome"], result["detail"]) for result in results}
    listed = [("refused", _line(*entry, why)) for entry, why in REFUSALS.items()]
    listed += [("skipped", f"{name}: {why}") for name, why in NOT_BUILT.items()]
    listed += [("differs", f"{name}: {why}") for name, (_, why) in DIFFERS.items()]
    return [detail for outcome, detail in listed if (outcome, detail) not in met]
