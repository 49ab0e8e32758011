"""Quantisation: is the concept still forgotten once the merged weights are rounded to 8 or 4 bits?

An erasure is a small change of the weights. Rounding can take it back, weight by weight, where it is smaller than half
a step. What is rounded here is what is deployed: the weights with the adapter in them. Rounding is *simulated*: weights
are rounded to the grid and kept in floating point, which gives the same weights as a kernel that stores them in few
bits (activations stay as they are, as in weight-only formats).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..evaluation.named_images import named_probes
from ..evaluation.probes import Probe, ProbeResults, evaluate_probes
from ..figures.style import BEFORE
from .material import Material, Needs
from .models import deployed_copy, merged_copy
from .panels import AFTER, CONTROL, draw_groups
from .results import AttackResult


SCHEMES = ("int8", "int4", "nf4")


@dataclass(frozen=True)
class QuantizationResult(AttackResult):
    """What `quantization_attack` returns.

    Args:
        concept (`str`, *optional*): The target, as the probe `forget` names it.
        after (`dict[str, dict]`): By scheme, "full" first, the scores of the erased model.
        before (`dict[str, dict]`, *optional*): The same of the model without its adapter; None if it has none.
        group_size (`int`): Weights that share a scale in 4 bits.
    """

    concept: str | None
    after: dict[str, dict]
    before: dict[str, dict] | None
    group_size: int

    name = "quantization"
    label = "named after quantisation"
    title = "Merged and quantised"
    needs = Needs()
    is_share = True
    untested = ("quantisation", "whether the erasure survives rounding the merged model to 8 or 4 bits")

    @property
    def worst(self) -> str:
        """The scheme that brings most of the target back."""
        return max(
            (scheme for scheme in self.after if scheme != "full"), key=lambda s: self.after[s]["forget"]["value"]
        )

    @classmethod
    def make(cls, model, processor, material: Material) -> QuantizationResult:
        probes = named_probes(material.concept, material.images, questions=material.questions, aliases=material.aliases)
        probes = [probe for probe in probes if probe.name in ("forget", "retain")]
        return quantization_attack(model, processor, probes, progress=material.progress)

    def summary(self) -> dict:
        return {
            "value": self.after[self.worst]["forget"]["value"],
            "control": self.after["full"]["forget"]["value"],
            "before": None if self.before is None else self.before[self.worst]["forget"]["value"],
            "n": self.after[self.worst]["forget"]["n"],
            "meaning": (
                f"images of the target named after the merged weights were rounded to {self.worst}, the worst of "
                f"{', '.join(s for s in self.after if s != 'full')} (simulated); control: not rounded"
            ),
        }

    def details(self) -> dict:
        return asdict(self)

    @staticmethod
    def draw(axes, details: dict) -> None:
        schemes = list(details["after"])
        series = [("target named, after", AFTER, [details["after"][s]["forget"]["value"] for s in schemes])]
        if details["before"] is not None:
            series.insert(
                0, ("target named, before", BEFORE, [details["before"][s]["forget"]["value"] for s in schemes])
            )
        if all("retain" in details["after"][s] for s in schemes):
            series.append(("others kept, after", CONTROL, [details["after"][s]["retain"]["value"] for s in schemes]))
        draw_groups(axes, schemes, series)


def quantization_attack(
    model,
    processor,
    probes: Sequence[Probe],
    *,
    schemes: Sequence[str] = ("int8", "int4"),
    group_size: int = 64,
    batch_size: int = 64,
    max_new_tokens: int = 12,
    progress: bool = True,
) -> QuantizationResult:
    """Evaluates probes on the merged model in full precision and rounded to few bits, and on the deployed one likewise.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model; it is not changed.
        processor (`ProcessorMixin`): Its processor.
        probes (`list[Probe]`): As made by `build_probes`; one must be called `forget` and have rows. Kept shares are of
            what the deployed model knows in full precision.
        schemes (`list[str]`, defaults to `("int8", "int4")`): "int8" (a scale per output channel), "int4" (a scale per
            `group_size` weights of a channel), "nf4" (bitsandbytes' 4-bit format, needs that package).
        group_size (`int`, defaults to 64): See `schemes`.
        batch_size (`int`, defaults to 64): Questions a forward pass.
        max_new_tokens (`int`, defaults to 12): Longest answer, in tokens.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        [`QuantizationResult`]

    Raises:
        ValueError: If a scheme is unknown, or no probe is called `forget`.
    """
    schemes = tuple(dict.fromkeys(schemes))
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown or not schemes:
        raise ValueError(f"`schemes` must be among {SCHEMES}, got {list(schemes)}.")
    forget = next((probe for probe in probes if probe.name == "forget" and len(probe.rows)), None)
    if forget is None:
        raise ValueError("no probe called 'forget' has rows: pass `target_images` to `build_probes`.")
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": progress}

    def scores(full: nn.Module, baseline: ProbeResults | None) -> tuple[dict[str, dict], ProbeResults]:
        result = evaluate_probes(full, processor, probes, baseline=baseline, **options)
        found = {"full": result.scores}
        known = baseline or result
        for scheme in schemes:
            rounded = quantize_weights(merged_copy(full), scheme, group_size=group_size)
            found[scheme] = evaluate_probes(rounded, processor, probes, baseline=known, **options).scores
        return found, result

    deployed = deployed_copy(model)
    before, baseline = (None, None) if deployed is None else scores(deployed, None)
    after, _ = scores(merged_copy(model), baseline)
    return QuantizationResult(forget.names[0] if forget.names else None, after, before, group_size)


@torch.no_grad()
def quantize_weights(model: nn.Module, scheme: str, *, group_size: int = 64) -> nn.Module:
    """Rounds the weights of all linear layers but the output head, in place; that is what is usually left out.

    Args:
        model (`PreTrainedModel`): Without adapters.
        scheme (`str`): See `quantization_attack`.
        group_size (`int`, defaults to 64): Weights that share a scale in 4 bits.

    Returns:
        `PreTrainedModel`: The same model.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        weight = module.weight
        if scheme == "nf4":
            rounded = _nf4(weight, group_size)
        else:
            bits = int(scheme.removeprefix("int"))
            rounded = round_to_nearest(weight, bits, group_size=None if bits >= 8 else group_size)
        weight.copy_(rounded)
    return model


def round_to_nearest(weight: torch.Tensor, bits: int, *, group_size: int | None = None) -> torch.Tensor:
    """Weights on the nearest points of a symmetric grid with 2^(bits - 1) - 1 steps to either side of 0.

    Args:
        weight (`torch.Tensor`): `(m, d)`.
        bits (`int`): 2 to 16.
        group_size (`int`, *optional*): Neighbours in a row that share a grid, the last group may be smaller; a whole row
            by default.

    Returns:
        `torch.Tensor`: `(m, d)`, in the same dtype.

    Raises:
        ValueError: If `bits` is out of range or `group_size` below 1.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"`bits` must be from 2 to 16, got {bits}.")
    if group_size is not None and group_size < 1:
        raise ValueError(f"`group_size` must be at least 1 or None, got {group_size}.")
    rows, columns = weight.shape
    size = columns if group_size is None else min(group_size, columns)
    padded = nn.functional.pad(weight.float(), (0, -columns % size)).view(rows, -1, size)
    scale = padded.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return ((padded / scale).round() * scale).view(rows, -1)[:, :columns].to(weight.dtype)


def _nf4(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """There and back through bitsandbytes' own functions."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("the scheme 'nf4' is bitsandbytes' format: `pip install bitsandbytes`.") from error
    packed, state = functional.quantize_4bit(weight.detach().float(), blocksize=group_size, quant_type="nf4")
    return functional.dequantize_4bit(packed, state).to(weight.dtype)
