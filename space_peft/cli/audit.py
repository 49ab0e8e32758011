"""`space-peft audit`: the search for an image, from the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..attacks.audit import audit_concept
from ..attacks.report import AttackReport
from ..data.questions import questions_of
from ..records.folder import ATTACKS_NAME
from .pictures import load_images


def run_audit(args: argparse.Namespace) -> AttackReport:
    """Loads an erased model, audits it, and writes `attacks.json` and its picture to `args.output`.

    What other attacks have put into an `attacks.json` there about the same concept stays.

    Args:
        args (`argparse.Namespace`): As `space_peft.cli` parses it.

    Returns:
        [`AttackReport`]: With the audit.

    Raises:
        FileNotFoundError: If there is no adapter, or there are no images.
        ValueError: If an image does not decode, or `args.output` holds attacks on another concept.
    """
    output = Path(args.output)
    earlier = AttackReport.load(output) if (output / ATTACKS_NAME).exists() else None
    if earlier is not None and earlier.concept != args.concept:
        raise ValueError(
            f"{output} holds attacks on the erasure of {earlier.concept!r}, not {args.concept!r}; choose another folder."
        )
    images = [] if args.images is None else load_images(args.images)
    model, processor = load_attacked(args.adapter, args.base_model, dtype=args.dtype)
    result = audit_concept(
        model,
        processor,
        args.concept,
        images=images,
        restarts=args.restarts,
        control_name=args.control_name,
        questions=questions_of(args.question),
        steps=args.steps,
        seed=args.seed,
    )
    report = AttackReport.from_results(args.concept, [result])
    (report if earlier is None else earlier.updated(report)).save(output)
    return report


def load_attacked(adapter: str, base_model: str | None, dtype: str | None = None) -> tuple:
    """An erased model with its adapter, and the processor.

    Args:
        adapter (`str`): Folder or Hub id.
        base_model (`str`, *optional*): The original, by default the one recorded.
        dtype (`str`, *optional*): To load it in; by default as it was saved, on a CPU float32: processors have no fast
            arithmetic in half precision, and a search takes hundreds of passes.
    """
    from transformers import AutoProcessor

    from ..hub_cards import load_erased  # Stands above this package; a command may use it.

    where: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {"dtype": None}
    if dtype is not None:
        where["dtype"] = dtype
    model = load_erased(adapter, base_model=base_model, check_canary=False, **where)
    return model, AutoProcessor.from_pretrained(base_model or model.peft_config["default"].base_model_name_or_path)
