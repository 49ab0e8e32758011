"""What a run is made with that no benchmark names: the library's defaults. Runs made with others are not the same runs."""

from __future__ import annotations


def training_fields(config: type, **changed) -> dict:
    """A trainer's arguments as it would use them.

    Args:
        config (`type`): A subclass of `TrainingArguments`.
        changed: Fields that are given.

    Returns:
        `dict`: The fields that `TrainingArguments` does not have, and those in which it differs.
    """
    from transformers import TrainingArguments

    plain, own = TrainingArguments("any").to_dict(), config("any", **changed).to_dict()
    return {name: value for name, value in own.items() if name not in plain or plain[name] != value}


def adapter_fields(config) -> dict:
    """An adapter's rank, scale and layers, and what a `SpaceLoraConfig` has beside; also what "auto" means, which has changed."""
    from space_peft import SpaceLoraConfig

    own = config.space_fields() if isinstance(config, SpaceLoraConfig) else {}
    if own.get("max_rank") == "auto":
        own["auto_rank"] = config.auto_rank
    return {name: getattr(config, name) for name in ("r", "lora_alpha", "target_modules")} | own
