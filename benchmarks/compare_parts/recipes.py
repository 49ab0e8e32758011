"""What a method's runs are made with beside the settings that the search chooses: what the bench fixes, and the rest."""

from __future__ import annotations

import json

from defaults import adapter_fields, training_fields

from .methods import BATCH_SIZE, MAX_STEPS, METHODS, RANK, VARIANTS, Method, method_of, whole_of


def options(method: Method, max_steps: int = MAX_STEPS) -> dict:
    """Fields of its trainer's configuration that the search does not choose."""
    return {"max_steps": max_steps, "per_device_train_batch_size": BATCH_SIZE, **method.fixed}


def config_class(method: Method) -> type:
    """The class of its trainer's configuration."""
    from space_peft import trainers

    return getattr(trainers, method.trainer.replace("Trainer", "Config"))


def adapter(method: Method):
    """Its adapter's configuration."""
    from peft import LoraConfig

    from space_peft import SpaceLoraConfig

    config = SpaceLoraConfig if method.constrained else LoraConfig
    return config(r=RANK, lora_alpha=2 * RANK, **method.adapter)


def recipe(name: str) -> dict:
    """All fields of a method's trainer and adapter that are not settings, library defaults among them."""
    method = method_of(name)
    if method.trainer is None:
        return {}
    training = training_fields(config_class(method), **options(method))
    # A variant has its whole's settings. What a run keeps on disk, evaluates at once, or how it copies, does not change it.
    indifferent = {"canary_items", "fit_save_steps", "per_device_eval_batch_size", "dataloader_pin_memory"}
    chosen = {*method_of(whole_of(name)).knobs, *indifferent}
    training = {field: value for field, value in training.items() if field not in chosen}
    made = {"training": training, "adapter": adapter_fields(adapter(method))}
    return json.loads(json.dumps(made))


def check_recipes(stored: dict[str, dict]) -> dict[str, dict]:
    """Every method's recipe, after a comparison with those that stored runs were made with.

    Raises:
        ValueError: If one differs: old and new runs of a method are not runs of the same method.
    """
    current = {name: recipe(name) for name in (*METHODS, *VARIANTS)}
    for name, made in stored.items():
        for part, fields in current.get(name, {}).items():
            for field in {**fields, **made.get(part, {})}:
                was, now = made.get(part, {}).get(field), fields.get(field)
                if was != now:
                    raise ValueError(
                        f"the stored runs of {name!r} were made with {part}.{field} = {was!r}, it is {now!r} now: give "
                        "it the old value in compare_parts/methods.py, or write to another --output."
                    )
    return current
