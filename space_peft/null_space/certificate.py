"""What an adapter does to retained inputs, one layer at a time: a bound over the fitted sample, and what was measured.

The bound is on a root mean square over the sample that the null space was fitted to, at the inputs that the layer has in
the deployed model. It bounds no single token (on the demo they reach seven times as much), no other data, and not what
a layer puts out once earlier layers have changed its inputs. What all layers together do to answers is counted end to
end, see [`EndToEnd`].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from ..distributed import processes
from ..modeling.layers import adapted_layers, lora_weights
from ..records.folder import CERTIFICATE_NAME
from ..records.io import write_json
from ..records.safe_json import read_json
from ..retained.end_to_end import EndToEnd
from ..retained.held_out import HeldOut
from ..statistics.calibration import Calibration
from .identity import adapter_digest
from .observing import observe_inputs
from .space import NullSpace


_FORMAT = "space_peft.certificate.v1"
# A weight may lie outside of a hard null space by this share: rounding to bfloat16. It counts in the bound.
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class LayerCertificate:
    """
    One layer of a [`RetentionCertificate`]. Changes are root mean squares over retained inputs of `||dW h||`, with
    `dW = s B A`, in units of the layer's output; kinds of tokens (image, text) weigh the same. `h` are the layer's inputs
    in the deployed model, all adapters off: what changes of earlier layers do to them is not in it.

    Args:
        name (`str`): The layer in the base model.
        dim (`int`): `d`, its number of inputs.
        rank (`int`): `k`, the directions the constraint acts on, see [`NullSpace.rank`].
        free_dimensions (`float`): `trace(P)`, the directions left to learn in.
        kept (`float`): Share of the fitted inputs' energy kept from the adapter.
        update_norm (`float`): `||s B A||_F`.
        bound (`float`): Bound on that root mean square over the sample the null space was fitted to, whatever the
            direction of the update, see [`NullSpace.bound`]. Single inputs, and other data, may change by more.
        fitted_change (`float`): The root mean square over that sample, from the stored eigenpairs (never too small).
        change (`float`): The root mean square measured on the data given.
        relative_change (`float`): `E||dW h||^2 / E||W h||^2`, measured on the data given.
    """

    name: str
    dim: int
    rank: int
    free_dimensions: float
    kept: float
    update_norm: float
    bound: float
    fitted_change: float
    change: float
    relative_change: float


@dataclass(frozen=True)
class RetentionCertificate:
    """
    How far an adapter changes the deployed model's layers on retained data, each layer by itself: a bound on the root mean
    square over the fitted sample, the root mean square measured on held-out data, and beside them, end to end, how many
    answers are other ones.

    Stored beside the adapter (`space_certificate.json`) and re-checked after loading by measuring again.

    Args:
        constraint (`str`): `"soft"`, `"hard"` or `"none"`.
        strength (`float`): `t` of the soft constraint.
        energy (`float`): Share of the energy the hard constraint was asked to remove.
        statistics (`str`): `"token"` or `"pooled"`: what the null space was fitted to. Measuring is per token.
        fitted_counts (`dict[str, int]`): Largest number of samples, per kind, a layer's null space was fitted to.
        measured_counts (`dict[str, int]`): Largest number of tokens, per kind, a layer was measured on.
        layers (`tuple[LayerCertificate, ...]`): One per adapted layer.
        held_out (`HeldOut`, *optional*): Which rows it was measured on.
        weights_digest (`str`, *optional*): Of the adapter it was measured on, see [`adapter_digest`].
        end_to_end (`EndToEnd`, *optional*): How many whole answers change on held-out images and texts.
        calibration (`Calibration`, *optional*): How the adapter's scale was chosen, and for which risk.
    """

    constraint: str
    strength: float
    energy: float
    statistics: str
    fitted_counts: dict[str, int]
    measured_counts: dict[str, int]
    layers: tuple[LayerCertificate, ...]
    held_out: HeldOut | None = None
    weights_digest: str | None = None
    end_to_end: EndToEnd | None = None
    calibration: Calibration | None = None

    def worst(self, n: int = 5) -> list[LayerCertificate]:
        """Returns the `n` layers with the largest relative change, largest first."""
        return sorted(self.layers, key=lambda layer: layer.relative_change, reverse=True)[:n]

    @property
    def mean_relative_change(self) -> float:
        """Mean over the layers of `E||dW h||^2 / E||W h||^2`."""
        return sum(layer.relative_change for layer in self.layers) / len(self.layers)

    @property
    def max_relative_change(self) -> float:
        """Largest `E||dW h||^2 / E||W h||^2` of a layer."""
        return self.worst(1)[0].relative_change

    def to_dict(self) -> dict:
        """Returns plain values, as the JSON file holds them."""
        content = {"format": _FORMAT, **asdict(self)}
        content["layers"] = [asdict(layer) for layer in self.layers]
        for key in ("end_to_end", "calibration"):
            part = getattr(self, key)
            content[key] = None if part is None else part.to_dict()
        content["mean_relative_change"] = self.mean_relative_change
        content["max_relative_change"] = self.max_relative_change
        return content

    @classmethod
    def from_dict(cls, content: dict) -> RetentionCertificate:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If it is no certificate of this version, or says what does not follow from its own counts.
        """
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"this is not a retention certificate: expected a JSON object with format {_FORMAT!r}.")
        try:
            # Certificates of version 0.1.0 have none of these.
            optional = ("held_out", "weights_digest", "end_to_end", "calibration")
            values = {option.name: content[option.name] for option in fields(cls) if option.name not in optional}
            values["layers"] = tuple(_checked(LayerCertificate, layer) for layer in values["layers"])
            if content.get("held_out") is not None:
                values["held_out"] = _checked(HeldOut, content["held_out"])
            values["weights_digest"] = content.get("weights_digest")
            if (part := content.get("end_to_end")) is not None:
                bounds = {key: part[key] for key in ("share_bound", "log_prob_bound")}
                values["end_to_end"] = _checked(EndToEnd, {key: part[key] for key in part if key not in bounds})
                values["end_to_end"].check_bounds(bounds)
            if (part := content.get("calibration")) is not None:
                values["calibration"] = Calibration(**part)
            _check_whole(values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the retention certificate is incomplete: {error}. Measure it again.") from error
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON to a file, or to `space_certificate.json` in a folder that exists."""
        write_json(Path(path, CERTIFICATE_NAME) if Path(path).is_dir() else path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> RetentionCertificate:
        """Reads what `save` wrote, from the file or its folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is truncated or of another kind.
        """
        path = Path(path, CERTIFICATE_NAME) if Path(path).is_dir() else Path(path)
        remedy = "Measure the certificate again."
        return cls.from_dict(read_json(path, kind="retention certificate", remedy=remedy))


def _check_whole(values: dict) -> None:
    """Raises `TypeError` if a field of a certificate is of a type it cannot have."""
    if not values["layers"]:
        raise TypeError("it has no layers")
    for key in ("constraint", "statistics"):
        if not isinstance(values[key], str):
            raise TypeError(f"`{key}` is {values[key]!r:.80}; expected str")
    if not isinstance(values["weights_digest"], (str, type(None))):
        raise TypeError(f"`weights_digest` is {values['weights_digest']!r:.80}; expected str")
    for key in ("strength", "energy"):
        if isinstance(values[key], bool) or not isinstance(values[key], (int, float)):
            raise TypeError(f"`{key}` is {values[key]!r:.80}; expected a number")
    for key in ("fitted_counts", "measured_counts"):
        counts = values[key]
        if not isinstance(counts, dict) or any(type(count) is not int for count in counts.values()):
            raise TypeError(f"`{key}` is {counts!r:.80}; expected numbers of samples by kind")


_PLAIN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}


def _checked(kind: type, content: dict):
    """A dataclass of plain numbers and texts from JSON; raises `TypeError` if a value is of another type."""
    result = kind(**content)
    for option in fields(kind):
        value, wanted = getattr(result, option.name), _PLAIN[str(option.type)]
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise TypeError(f"`{option.name}` is {value!r:.80}; expected {option.type}")
    return result


class _ChangeMeter:
    """Running sums of `||dW h||^2` and `||W h||^2` of one layer, per kind of token."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}  # kind -> (2,), float64
        self.counts: dict[str, int] = {}

    def update(self, group: str, change: torch.Tensor, output: torch.Tensor) -> None:
        """Adds outputs `(n, m)` of the update and of the layer."""
        squares = [float(values.to(torch.float32).square().sum(dtype=torch.float64)) for values in (change, output)]
        self.sums[group] = self.sums.get(group, torch.zeros(2, dtype=torch.float64)) + torch.tensor(squares).double()
        self.counts[group] = self.counts.get(group, 0) + len(change)

    def means(self) -> tuple[float, float]:
        """`E||dW h||^2` and `E||W h||^2`: mean over the kinds of each kind's mean, as in `C`."""
        kinds = [self.sums[group] / self.counts[group] for group in sorted(self.sums) if self.counts[group]]
        change, output = (torch.stack(kinds).mean(dim=0) if kinds else torch.zeros(2)).tolist()
        return change, output

    def changes(self) -> tuple[float, float]:
        """`change` and `relative_change`, see [`LayerCertificate`]."""
        change, output = self.means()
        return change**0.5, change / output if output > 0 else 0.0


def _add_up_processes(meters: dict[str, _ChangeMeter]) -> None:
    """Adds up what each process measured on its share of the batches."""
    parts = processes.gather_objects({name: (meter.sums, meter.counts) for name, meter in meters.items()})
    for name, meter in meters.items():
        meter.sums, meter.counts = {}, {}
        for sums, counts in (part[name] for part in parts):
            for group in sums:
                meter.sums[group] = meter.sums.get(group, 0.0) + sums[group]
                meter.counts[group] = meter.counts.get(group, 0) + counts[group]


def measure_certificate(
    model: nn.Module,
    null_spaces: Mapping[str, NullSpace],
    dataloader: Iterable[Mapping],
    adapter_name: str = "default",
    *,
    image_token_id: int | None = None,
    progress: bool = True,
    held_out: HeldOut | None = None,
) -> RetentionCertificate:
    """Measures on retained data, best held out from fitting and training, what an adapter does to each layer.

    One pass over the deployed model (adapters off): each layer's own inputs `h` are used, so changes of earlier layers
    do not count twice.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With the trained adapter, not merged.
        null_spaces (`dict[str, NullSpace]`): Those it was trained under.
        dataloader (iterable of `dict[str, torch.Tensor]`): Retained batches, as in [`fit_null_space`].
        adapter_name (`str`, defaults to `"default"`): The adapter.
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        progress (`bool`, defaults to `True`): Whether to show a progress bar.
        held_out ([`HeldOut`], *optional*): Which rows the batches are, so that others can measure on the same.

    Returns:
        [`RetentionCertificate`]: The certificate.

    Raises:
        ValueError: If null spaces are missing, a layer saw no data, or the adapter is not in a hard null space.
    """
    layers = adapted_layers(model, adapter_name)
    bounds, norms = recompute_bounds(model, null_spaces, adapter_name), update_norms(model, adapter_name)
    digest = adapter_digest(model, adapter_name)
    meters = _measure(model, dataloader, layers, adapter_name, image_token_id, progress)
    rows = []
    for name in layers:
        space = null_spaces[name]
        bound, fitted_change = bounds[name]
        change, relative_change = meters[name].changes()
        rows.append(
            LayerCertificate(
                name=name,
                dim=space.dim,
                rank=space.rank,
                free_dimensions=space.free_dimensions,
                kept=space.kept,
                update_norm=norms[name],
                bound=bound,
                fitted_change=fitted_change,
                change=change,
                relative_change=relative_change,
            )
        )
    first = null_spaces[rows[0].name]
    return RetentionCertificate(
        constraint=first.constraint,
        strength=first.strength,
        energy=first.energy,
        statistics=first.statistics,
        fitted_counts=largest_counts(null_spaces[name].counts for name in layers),
        measured_counts=largest_counts(meter.counts for meter in meters.values()),
        layers=tuple(rows),
        held_out=held_out,
        weights_digest=digest,
    )


def measure_changes(
    model: nn.Module,
    dataloader: Iterable[Mapping],
    adapter_name: str = "default",
    *,
    image_token_id: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """What a certificate measures, for which no null spaces are needed: to check one that somebody else has made.

    Args:
        model (`PeftModel` or `PreTrainedModel`): See [`measure_certificate`].
        dataloader (iterable of `dict[str, torch.Tensor]`): Retained batches.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `tuple[dict[str, tuple[float, float]], dict[str, int]]`: `change` and `relative_change` of each layer, see
        [`LayerCertificate`], and the largest number of tokens, per kind, a layer was measured on.

    Raises:
        ValueError: If a layer saw no data.
    """
    layers = adapted_layers(model, adapter_name)
    meters = _measure(model, dataloader, layers, adapter_name, image_token_id, progress)
    return {name: meter.changes() for name, meter in meters.items()}, largest_counts(
        meter.counts for meter in meters.values()
    )


def update_norms(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """`||s B A||_F` of each adapted layer, as [`LayerCertificate`] has it, from the weights alone."""
    norms = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        a, b, scaling = lora_weights(layer, adapter_name)
        norms[name] = float(_same_norms(scaling * processes.whole(b), processes.whole(a)).norm())
    return norms


def recompute_bounds(
    model: nn.Module, null_spaces: Mapping[str, NullSpace], adapter_name: str = "default"
) -> dict[str, tuple[float, float]]:
    """`bound` and `fitted_change` of each layer, see [`LayerCertificate`], from the weights and null spaces alone.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With the adapter, not merged.
        null_spaces (`dict[str, NullSpace]`): Those it was trained under.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Raises:
        ValueError: If null spaces are missing, or the adapter is not in a hard null space.
    """
    layers = adapted_layers(model, adapter_name)
    missing = [name for name in layers if name not in null_spaces]
    if missing:
        raise ValueError(f"{len(missing)} adapted layers have no null space, the first is {missing[0]!r}.")
    result = {}
    for name, layer in layers.items():
        a, b, scaling = lora_weights(layer, adapter_name)
        bound = _bound(name, layer, null_spaces[name], adapter_name)
        update = _same_norms(scaling * processes.whole(b), processes.whole(a))
        result[name] = bound, min(null_spaces[name].change(update), bound)
    return result


def _measure(model, dataloader, layers, adapter_name, image_token_id, progress) -> dict[str, _ChangeMeter]:
    """One pass over the data; every layer has seen some of it."""
    meters = {name: _ChangeMeter() for name in layers}

    def visit(name: str, x: torch.Tensor, parts) -> None:
        layer = layers[name]
        base = layer.get_base_layer()
        a, b, scaling = lora_weights(layer, adapter_name)
        for group, mask in parts():
            h = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]  # (n, d)
            if len(h) == 0:
                continue
            output = _without_bias(base, h)  # (n, m), W h
            dtype = torch.promote_types(a.dtype, torch.float32)
            change = scaling * (h.to(dtype) @ a.T.to(dtype)) @ b.T.to(dtype)  # (n, m)
            meters[name].update(group, change, output)

    observe_inputs(
        model, dataloader, layers, visit, image_token_id=image_token_id, progress=progress, desc="Certifying"
    )
    _add_up_processes(meters)
    unseen = [name for name, meter in meters.items() if not any(meter.counts.values())]
    if unseen:
        raise ValueError(
            f"{len(unseen)} adapted layers saw no retained data, the first is {unseen[0]!r}; give rows that use them."
        )
    return meters


def _bound(name: str, layer, space: NullSpace, adapter_name: str) -> float:
    """The bound on the change (docs/method.md, section 4): `s B A'` with `A = A' P` goes into [`NullSpace.bound`]."""
    a, b, scaling = lora_weights(layer, adapter_name)
    a, b = processes.whole(a).detach().double(), processes.whole(b)
    if not space.invertible:
        inside = space.project(a)
        outside = float((a - inside).norm()) / max(float(a.norm()), torch.finfo(torch.float32).tiny)
        if outside > _ROUNDING:
            raise ValueError(
                f"the adapter was not trained under this {space.constraint} null space: {outside:.1%} of lora_A of layer {name!r} "
                "lies in protected directions. Give the null spaces saved with the adapter."
            )
        # What rounding has put into protected directions adds to the change.
        return space.bound(_same_norms(scaling * b, inside)) + space.change(_same_norms(scaling * b, a - inside))
    return space.bound(_same_norms(scaling * b, space.unproject(a)))


def _without_bias(base: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """`W h` `(n, m)` of inputs `(n, d)` from the layer itself, whose weight may be packed, quantised or offloaded."""
    if base.weight.dtype.is_floating_point:
        h = h.to(base.weight.dtype)
    if getattr(base, "bias", None) is None:
        return base(h)
    return base(h) - base(torch.zeros_like(h[:1]))


def _same_norms(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """An `(r, d)` matrix that maps every input to an output as long as `B A` does; `B A` itself may be huge."""
    # With B = Q R and Q's columns orthonormal, ||B A h|| = ||R A h||.
    return torch.linalg.qr(b.detach().double(), mode="r").R @ a.detach().double()


def largest_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The largest number of each kind, over layers."""
    result: dict[str, int] = {}
    for count in counts:
        for group, number in count.items():
            result[group] = max(result.get(group, 0), number)
    return dict(sorted(result.items()))
