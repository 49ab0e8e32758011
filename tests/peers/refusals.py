"""What is known not to run, and why. Whatever is in neither list counts as a failure."""

from __future__ import annotations

import re


# Options of `LoraConfig` that `SpaceLoraConfig` refuses on purpose, with the values they are refused for.
REFUSALS = {
    "use_dora": "True",
    "use_qalora": "True",
    "modules_to_save": r"[\[({].*",
    "bias": "'(all|lora_only)'",
    "lora_bias": "True",
    "trainable_token_indices": r"[\[{].*",
    "target_parameters": r"[\[{'].*",
    "init_lora_weights": "'(eva|olora|pissa|pissa_niter_.*|corda|loftq|lora_ga)'",
    "alora_invocation_tokens": "a LoRA variant",
    "arrow_config": "a LoRA variant",
    "use_bdlora": "a LoRA variant",
    "velora_config": "a LoRA variant",
    "kasa_config": "a LoRA variant",
}

# Ids of the Hub that are not built here.
NOT_BUILT = {
    "hf-internal-testing/tiny-sd-pipe": "a whole diffusion pipeline",
}


def refused_option(message: str) -> str | None:
    """The option of `REFUSALS` that a refusal of our config is about; `None` if it is not listed with that value."""
    found = re.match(r"`(\w+)` (?:is|holds the rank|asks for) (.*)", message, re.DOTALL)
    if not found:
        return None
    option, rest = found.groups()
    listed = option in REFUSALS and re.match(REFUSALS[option], rest, re.DOTALL)
    return option if listed else None
