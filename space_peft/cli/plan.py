"""`space-peft plan`: what an erasure would take, from a model's config alone."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from PIL import Image
from transformers import AutoProcessor

from ..arguments import AdapterArguments, get_space_config
from ..config import SpaceLoraConfig
from ..data.questions import DEFAULT_QUESTIONS
from ..modeling.loading import check_device, default_dtype, load_config, load_model, model_class, saved_dtype
from ..modeling.prompts import answer_logits, conversation, encode_conversations, to_device
from ..modeling.targets import Target
from ..null_space.constraints import FITTED
from ..null_space.observing import visual_tokens
from ..null_space.planning import ErasurePlan, plan_erasure
from ..null_space.workload import Workload, picture_tokens
from ..records.durations import duration
from ..records.places import refuse_missing
from .places import model_place


_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_PICTURE = Image.new("RGB", (448, 448), "gray")
_MOST_LINES = 18


def run_plan(args: argparse.Namespace) -> tuple[ErasurePlan | None, list[str]]:
    """Builds the model without weights, puts the adapter in, and counts.

    Args:
        args (`argparse.Namespace`): Of the command.

    Returns:
        `tuple`: The plan, `None` if the adapter cannot be put in at all; and what would be refused.

    Raises:
        OSError: If there is no config of a model.
        ValueError: If a setting makes no sense.
    """
    place = _place(args.model)
    adapter = get_space_config(
        AdapterArguments(**{part.name: getattr(args, part.name) for part in dataclasses.fields(AdapterArguments)})
    )
    device = _device(args)
    if args.time:
        check_device(device)
    config = load_config(place)
    dtype = _dtype(args.dtype, config, device)
    processor = _processor(place, required=args.time)
    refused: list[str] = []
    encoded = None
    if processor is not None:
        encoded = _attempt(lambda: encode_conversations(processor, [_row()]), refused)
    if device == "cpu" and dtype == torch.float16:
        refused.append(
            "float16 on a CPU: processors have no fast arithmetic for it (a step of the embedded model takes fourteen times "
            "as long as in float32), and its sums overflow. Use --dtype float32."
        )
    model = _attempt(lambda: empty_model(config, dtype), refused)
    if model is None:
        return None, refused
    image_tokens = args.image_tokens
    if image_tokens is None and encoded is not None:
        image_tokens = _image_tokens(model, encoded) or None
    options = {"rows": args.rows, "steps": args.steps, "batch_size": args.batch_size}
    workload = Workload.of(config, image_tokens=image_tokens, row_tokens=args.row_tokens, **options)
    model = _attempt(lambda: _with_adapter(model, adapter, args.target), refused)
    plan = None if model is None else _attempt(lambda: plan_erasure(model, workload), refused)
    if plan is None:
        return None, refused
    refused = list(dict.fromkeys([*refused, *plan.refused]))
    needed, there = max(plan.fitting, plan.training), _memory(device)
    if there is not None and needed > there:
        refused.append(
            f"about {_bytes(needed)} are needed, and this machine's {device} has {_bytes(there)}. See which part is "
            "largest: adapt less (--target-modules), take a smaller --batch-size, or another machine."
        )
    if args.time:
        if refused:
            raise ValueError(f"no step is timed, because the run would be refused: {refused[0]}")
        plan = dataclasses.replace(
            plan, seconds=plan.timed(_time_step(place, device, dtype, processor, adapter, plan, args))
        )
    return dataclasses.replace(plan, refused=tuple(refused)), refused


def empty_model(config, dtype: torch.dtype):
    """The model of a config on the meta device: every shape, no weight.

    Raises:
        ValueError: If the config is not that of a multimodal model that transformers knows.
    """
    kind = model_class(config)
    with init_empty_weights():
        model = kind.from_config(config, dtype=dtype)
    model.tie_weights()  # Without memory each place was given a parameter of its own.
    return model


def _with_adapter(model, adapter: SpaceLoraConfig, target: Target):
    from ..trainers.given_adapter import add_adapter  # Stands above this package; a command may use it.

    return add_adapter(model, adapter, target, output_dir="")


def _attempt(make: Callable, refused: list[str]):
    """What `make` returns; `None`, and its words among what is refused, if it raises what the library's checks do."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        refused.append(str(error))
        return None


def _place(model: str) -> str:
    model = model_place(model)
    refuse_missing(model)
    return model


def _device(args: argparse.Namespace) -> str:
    """Where it is to run: on a GPU, but a step that is timed runs here."""
    return args.device or ("cuda" if torch.cuda.is_available() or not args.time else "cpu")


def _dtype(asked: str | None, config, device: str) -> torch.dtype:
    """The precision that `erase` would load the model in."""
    dtype = asked or default_dtype(config, device)
    if dtype == "auto":
        return saved_dtype(config)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def no_gpu(args: argparse.Namespace) -> str | None:
    """What a plan does not say because there is no GPU here.

    Args:
        args (`argparse.Namespace`): Of the command.
    """
    if torch.cuda.is_available() or args.device == "cpu":
        return None
    if args.time:
        return "no GPU here: the step was timed on the CPU"
    return "no GPU here: it is not known whether the memory of one suffices (--device cpu: whether this machine's does)"


def _processor(place: str, *, required: bool):
    """The processor, if its files lie beside the config; from the Hub only where it is needed."""
    if required or any(Path(place, name).is_file() for name in _PROCESSOR_FILES):
        return AutoProcessor.from_pretrained(place)
    return None


def _row() -> dict:
    return conversation(DEFAULT_QUESTIONS.naming[0], answer="Something unknown", image=_PICTURE)


def _image_tokens(model, encoded: dict) -> int:
    """How many tokens of one encoded row stand for its picture."""
    ids = encoded["input_ids"][0]
    return int(torch.isin(ids, torch.tensor(visual_tokens(model), dtype=ids.dtype)).sum())


def _memory(device: str) -> int | None:
    """Bytes that a device of this machine has; `None` if it has no such device, and the plan is for another machine."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None


def _time_step(place: str, device: str, dtype, processor, adapter: SpaceLoraConfig, plan: ErasurePlan, args) -> float:
    """Seconds of a step of the plan, from one that is run: forward, backward, with the adapter, on gray pictures."""
    model = load_model(place, device, dtype=dtype)
    model = _with_adapter(model, dataclasses.replace(adapter), args.target)
    batch = encode_conversations(processor, [_row()] * args.batch_size)
    image_tokens = _image_tokens(model.get_base_model(), batch)
    patches, merged = picture_tokens(model.get_base_model().config)
    ran = dataclasses.replace(
        plan.workload,
        image_tokens=image_tokens,
        row_tokens=batch["input_ids"].shape[1],
        patches=-(-image_tokens * patches // merged),
    )
    batch = to_device(batch, model)
    seconds = []
    for _ in range(3):  # The first one warms up.
        start = time.perf_counter()
        answer_logits(model, batch).float().logsumexp(dim=-1).mean().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) * plan.flops["step"] / plan_erasure(model, ran).flops["step"]


def plan_table(plan: ErasurePlan) -> str:
    """The plan on one screen."""
    work, kinds = plan.workload, plan.kinds_of_layers()
    modules = plan.to_dict()["modules"]
    where = ", ".join(f"{count} of {part}" for part, count in modules.items())
    lines = [
        f"{plan.model} in {plan.dtype}",
        f"{len(plan.layers)} modules get the adapter ({where})",
        "",
        f"{'modules':<44}{'count':>6}{'inputs':>8}{'outputs':>9}{'kept':>7}{'left':>8}{'parameters':>12}",
    ]
    for pattern, layers in kinds[:_MOST_LINES]:
        one, name = layers[0], pattern if len(pattern) <= 42 else f"...{pattern[-39:]}"
        kept, left = (one.columns, one.inputs - one.columns) if FITTED[plan.constraint].foreseen else ("-", "-")
        parameters = f"{sum(layer.parameters for layer in layers):,}"
        lines.append(f"{name:<44}{len(layers):>6}{one.inputs:>8}{one.outputs:>9}{kept:>7}{left:>8}{parameters:>12}")
    if len(kinds) > _MOST_LINES:
        lines.append(f"... and {len(kinds) - _MOST_LINES} more kinds (--json has all)")
    lines.append(f"{'all':<44}{len(plan.layers):>6}{'':>32}{plan.parameters:>12,}")
    weights = ", ".join(f"{part} {_bytes(size)}" for part, size in plan.weights.items())
    published = "-" if plan.published is None else _bytes(plan.published)
    shape = f"{work.row_tokens} tokens, {work.image_tokens} of them the picture's ({work.patches} in the tower)"
    rows = {
        "memory": f"fitting {_bytes(plan.fitting)}, training {_bytes(plan.training)}",
        "  weights": f"{_bytes(sum(plan.weights.values()))} ({weights})",
        "  second moments": f"{_bytes(plan.sums)} while fitting, {len(plan.unique)} different inputs",
        "  null spaces": f"{_bytes(plan.null_spaces)} at most",
        "  adapter, optimiser": _bytes(plan.adapter_state),
        "  a step": f"about {_bytes(plan.activations)} of activations",
        "rows": f"{work.rows:,} of {shape}",
        "tokens": f"{work.rows * work.row_tokens:,} read, {plan.counted:,} of a layer counted",
        "work": f"fitting {_flops(plan.flops['passes'] + plan.flops['sums'])}, decomposition "
        f"{_flops(plan.flops['decomposition'])}, {work.steps} steps of {work.batch_size} rows {_flops(plan.flops['steps'])}",
        "statistics": f"{published} if published (`space-peft stats`, all layers)",
    }
    if plan.seconds is not None:
        told = {"fitting": "fitting", "decomposition": "decomposition", "steps": f"{work.steps} steps", "all": "in all"}
        rows["time"] = ", ".join(f"{name} {duration(plan.seconds[key])}" for key, name in told.items())
    else:
        rows["time"] = "not known until a step is timed: use --time on the machine that is to do it"
    return "\n".join([*lines, "", *(f"{name:<22}{text}" for name, text in rows.items())])


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _flops(count: float) -> str:
    for unit in ("M", "G", "T", "P"):
        count /= 1000 if unit != "M" else 1e6
        if count < 1000 or unit == "P":
            return f"{count:.3g} {unit}FLOP"
    raise AssertionError
