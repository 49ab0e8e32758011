"""What an erasure claims of its weights, checked again: certificate, bound, and the change on retained data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from space_peft.choices import CONSTRAINTS
from space_peft.config import SpaceLoraConfig
from space_peft.modeling.layers import adapted_layers
from space_peft.null_space.certificate import (
    RetentionCertificate,
    largest_counts,
    measure_changes,
    recompute_bounds,
    update_norms,
)
from space_peft.null_space.constraints import FITTED
from space_peft.null_space.identity import adapter_digest
from space_peft.null_space.space import NullSpace, load_null_spaces
from space_peft.records.folder import CERTIFICATE_NAME, NULL_SPACES_NAME, SPACE_CONFIG_NAME
from space_peft.records.safe_json import read_json
from space_peft.records.stages import in_stages
from space_peft.retained.reading import RetainedRows, retained_loader

from .source import AdapterSource


OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
# A layer's change, measured again on the same rows in another precision or batch size, may differ by this share.
TOLERANCE = 0.05
# Retained vectors are stored in float32, and those of a Krylov method are orthogonal up to more than its rounding.
_ORTHOGONAL = 1e-4
_FLOAT32 = 2.0**-20


@dataclass(frozen=True)
class Check:
    """
    One line of a [`VerifyReport`].

    Args:
        name (`str`): What was checked.
        status (`str`): `"ok"`, `"FAILED"` or `"not checked"`.
        message (`str`): What was found, or why nothing was checked.
        file (`str`, *optional*): The file at fault.
    """

    name: str
    status: str
    message: str
    file: str | None = None


def check_certificate(source: AdapterSource, model: PeftModel) -> Check:
    """Whether the certificate is of these weights and settings."""
    name = "certificate"
    if not (source.folder / CERTIFICATE_NAME).is_file():
        return Check(name, NOT_CHECKED, f"no {CERTIFICATE_NAME}: trained without the constraint, or not measured")
    certificate = source.read(CERTIFICATE_NAME, RetentionCertificate.load)

    def failed(message: str) -> Check:
        return Check(name, FAILED, message, CERTIFICATE_NAME)

    config = next(iter(model.peft_config.values()))
    for key in ("constraint", "strength", "energy", "statistics"):
        if isinstance(config, SpaceLoraConfig) and getattr(config, key) != getattr(certificate, key):
            return failed(
                f"{key} is {getattr(certificate, key)!r}, but {getattr(config, key)!r} in {SPACE_CONFIG_NAME}"
            )
    norms = update_norms(model)
    layers = {layer.name: layer for layer in certificate.layers}
    if len(layers) != len(certificate.layers):
        return failed("lists a layer twice")
    if set(norms) != set(layers):
        odd = min(set(norms) ^ set(layers))
        return failed(f"does not cover the layers that are adapted: {odd!r:.200} is only in one of the two")
    adapted = adapted_layers(model)
    for key, layer in layers.items():
        dim = adapted[key].in_features
        if layer.dim != dim:
            return failed(f"is of another model: {key!r} has {dim} inputs, not {layer.dim}")
        if abs(norms[key] - layer.update_norm) > _rounding(dim) * norms[key]:
            return failed(f"is of other weights: ||s B A|| of {key!r} is {norms[key]:.6g}, not {layer.update_norm:.6g}")
        if layer.fitted_change > layer.bound:
            return failed(f"contradicts itself: {key!r} changes by {layer.fitted_change:.6g}, bound {layer.bound:.6g}")
    content = read_json(source.folder / CERTIFICATE_NAME, kind="retention certificate")
    said = json.loads(json.dumps(certificate.to_dict()))
    said["end_to_end"] = content.get("end_to_end")  # Its bounds were computed again when it was read, up to rounding.
    if others := sorted(key for key, value in content.items() if key not in said or value != said[key]):
        return failed(f"contradicts itself: {others[0]!r:.80} does not follow from its layers")
    if certificate.weights_digest is None:
        return Check(
            name,
            NOT_CHECKED,
            "does not say which weights it was measured on (space-peft 0.1.0 wrote no such hash); their norms are those of "
            f"this adapter in all {len(layers)} layers, which other weights may have as well",
            CERTIFICATE_NAME,
        )
    if adapter_digest(model) != certificate.weights_digest:
        return failed("is of other weights: their SHA-256 is not the one it was measured on")
    found = f"is of these weights: {len(layers)} layers, {certificate.constraint} constraint"
    if certificate.end_to_end is not None:
        found += "; the bounds on changed answers follow from their counts, which are its author's word"
    return Check(name, OK, found)


def _rounding(dim: int) -> float:
    """Share by which a norm of float64 products over `dim` inputs may differ where it is computed again."""
    return 16 * dim * torch.finfo(torch.float64).eps


def check_bound(source: AdapterSource, model: PeftModel) -> Check:
    """Computes what a certificate says of the fitted data once more, from the weights and the statistics."""
    name = "bound"
    folder = source.folder
    if not (folder / CERTIFICATE_NAME).is_file():
        return Check(name, NOT_CHECKED, f"no {CERTIFICATE_NAME}")
    if not (folder / NULL_SPACES_NAME).is_file():
        return Check(
            name,
            NOT_CHECKED,
            f"no {NULL_SPACES_NAME}: bound, fitted change and directions in the certificate are its author's word "
            "(they are published with --include-null-spaces)",
        )
    certificate = source.read(CERTIFICATE_NAME, RetentionCertificate.load)
    spaces = load_null_spaces(folder / NULL_SPACES_NAME)  # Not kept meanwhile: they may be large.
    layers = {layer.name: layer for layer in certificate.layers}
    adapted = adapted_layers(model)
    if missing := sorted(set(adapted) - set(spaces)):
        return Check(name, FAILED, f"holds nothing for {len(missing)} adapted layers, {missing[0]!r}", NULL_SPACES_NAME)
    checked: set[int] = set()
    for key in adapted:
        space = spaces[key]
        if id(space) not in checked and (problem := _statistics_problem(space, adapted[key].in_features)):
            return Check(name, FAILED, f"are not valid statistics: for {key!r}, {problem}", NULL_SPACES_NAME)
        checked.add(id(space))
    try:
        bounds = recompute_bounds(model, spaces)
    except ValueError as error:
        return Check(name, FAILED, f"{error}", NULL_SPACES_NAME)

    def failed(message: str) -> Check:
        return Check(
            name, FAILED, f"does not follow from the weights and {NULL_SPACES_NAME}: {message}", CERTIFICATE_NAME
        )

    for key, (bound, fitted_change) in bounds.items():
        space, layer = spaces[key], layers.get(key)
        if layer is None:
            return failed(f"{key!r} is missing")
        for what in ("constraint", "strength", "energy", "statistics"):
            if getattr(space, what) != getattr(certificate, what):
                return failed(
                    f"{what} is {getattr(certificate, what)!r:.80}, the statistics' {getattr(space, what)!r:.80}"
                )
        # Products over `dim` inputs in float64; undoing the filter enlarges their rounding. A hard constraint's bound may
        # be all rounding: of the largest change that an input of the fitted size can suffer.
        gain = 1 / float(torch.cat([space.filters.double(), torch.tensor([space.outside])]).clamp_min(1e-12).min())
        share = _rounding(space.dim) * (gain if space.invertible else 1.0)
        floor = _rounding(space.dim) * layer.update_norm * math.sqrt(space.scale * space.dim)
        pairs = {
            "bound": (bound, share), "fitted_change": (fitted_change, share), "kept": (space.kept, 0.0),
            "free_dimensions": (space.free_dimensions, share), "rank": (space.rank, 0.0), "dim": (space.dim, 0.0),
        }  # fmt: skip
        for what, (wanted, allowed) in pairs.items():
            if abs(getattr(layer, what) - wanted) > allowed * abs(wanted) + (
                floor if allowed else _rounding(space.dim)
            ):
                return failed(f"{what} of {key!r} is {wanted:.6g}, certified as {getattr(layer, what):.6g}")
    counts = largest_counts(spaces[key].counts for key in adapted)
    if counts != certificate.fitted_counts:
        return failed(f"fitted to {counts}, certified as {certificate.fitted_counts}")
    return Check(
        name,
        OK,
        f"bound and fitted change of {len(bounds)} layers follow from the weights and {NULL_SPACES_NAME}; that those "
        "statistics are of retained data is its author's word",
    )


def _statistics_problem(space: NullSpace, dim: int) -> str | None:
    """Why a file's null space cannot be one: whoever invents its numbers could have any bound."""
    values, filters, basis = space.eigenvalues, space.filters, space.eigenvectors
    numbers = (
        space.scale, space.outside, space.next_eigenvalue, space.uncertainty, space.strength, space.energy,
    )  # fmt: skip
    if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
        return "something that should be a number is not"
    if type(space.start) is not int or space.start < 0 or space.constraint not in tuple(CONSTRAINTS):
        return f"`start` is {space.start!r:.40}, the constraint {space.constraint!r:.40}"
    counts = space.counts
    if (
        not isinstance(counts, dict)
        or not counts
        or any(type(count) is not int or count < 1 for count in counts.values())
    ):
        return f"the numbers of samples are {counts!r:.80}"
    columns = len(filters)
    shapes = (basis.shape, filters.shape, space.residuals.shape, values.dim())
    if shapes != ((dim, columns), (columns,), (columns,), 1) or not space.start + columns <= len(values) <= dim:
        return f"tensors of the shapes {[tuple(part) for part in shapes[:3]]} do not fit {dim} inputs"
    if not all(
        part.is_floating_point() and part.isfinite().all() for part in (basis, filters, values, space.residuals)
    ):
        return "values are NaN or infinite"
    if not all(math.isfinite(number) for number in numbers) or space.scale <= 0:
        return "a number is out of its range"
    if space.next_eigenvalue < 0 or space.uncertainty < 0:
        return "a number is out of its range"
    slack = _FLOAT32 * dim
    if (values < -slack).any() or (values.diff() > slack).any() or float(values.sum()) > dim + slack * dim:
        return "the eigenvalues are not those of a second moment, descending and of mean 1"
    rest = dim - len(values)
    if rest and float(values.sum()) + rest * space.next_eigenvalue < dim - slack * dim:
        return "the eigenvalues do not come to a mean of 1"
    if not rest and abs(float(values.sum()) - dim) > slack * dim:
        return "the eigenvalues do not come to a mean of 1"
    if (space.residuals < 0).any():
        return "residuals are negative"
    if not FITTED[space.constraint].made(space):
        return f"the filter is not that of a {space.constraint} constraint"
    error = basis.double().T @ basis.double() - torch.eye(columns, dtype=torch.float64)
    if columns and float(error.abs().max()) > _ORTHOGONAL:
        return "the eigenvectors are not orthonormal"
    return None


def check_retained(source: AdapterSource, model: PeftModel, rows: RetainedRows, processor: Any) -> Check:
    """Measures the certificate's change again."""
    name = "retained data"
    if not (source.folder / CERTIFICATE_NAME).is_file():
        return Check(name, NOT_CHECKED, f"no {CERTIFICATE_NAME} to compare with")
    certificate = source.read(CERTIFICATE_NAME, RetentionCertificate.load)
    every = range(len(rows))
    split = None if certificate.held_out is None else certificate.held_out.split(rows)
    fitted, indices = split or (every, every)
    with torch.no_grad():
        changes, counts = measure_changes(model, retained_loader(processor, rows, indices, 32), progress=in_stages())
    layers = {layer.name: layer for layer in certificate.layers}

    def failed(message: str) -> Check:
        return Check(name, FAILED, message, CERTIFICATE_NAME)

    def beyond_bound(measured: dict[str, tuple[float, float]], slack: float, where: str = "") -> str | None:
        """Which layers change by more than their bound and its share of slack, if any do."""
        beyond = {key: change for key, (change, _) in measured.items() if change > layers[key].bound * (1 + slack)}
        if not beyond:
            return None
        key = max(beyond, key=lambda key: beyond[key] / max(layers[key].bound, 1e-30))
        return (
            f"{len(beyond)} of {len(measured)} layers change by more than their bound{where}, {key!r} by "
            f"{beyond[key]:.4g}, bound {layers[key].bound:.4g}"
        )

    if counts != certificate.measured_counts:
        seen = f"rows other than the certificate's ({counts} tokens, not {certificate.measured_counts})"
        if beyond := beyond_bound(changes, slack=0.0):
            return failed(f"{seen}: {beyond}. The certificate does not hold for such data.")
        return Check(
            name,
            OK,
            f"{seen}: every one of {len(changes)} layers changes by less than its bound; the certified changes themselves "
            "were not compared",
        )
    if certificate.statistics == "token":
        with torch.no_grad():
            on_fitted, _ = measure_changes(model, retained_loader(processor, rows, fitted, 32), progress=in_stages())
        if beyond := beyond_bound(on_fitted, slack=TOLERANCE, where=" on the rows it was proven for"):
            return failed(f"{beyond}; the statistics are not of these rows")
    largest = 0.0
    for place, what in enumerate(("change", "relative_change")):
        certified = {key: getattr(layer, what) for key, layer in layers.items()}
        errors = {key: abs(change[place] - certified[key]) for key, change in changes.items()}
        # A layer that hardly changes is all rounding: compare it with the layer that changes most.
        floor = 1e-3 * max(change[place] for change in changes.values())
        # The relative change is a square.
        allowed = TOLERANCE * (1 + place)
        if off := {key: error for key, error in errors.items() if error > allowed * changes[key][place] + floor}:
            key = max(off, key=off.__getitem__)
            return failed(
                f"{len(off)} of {len(changes)} layers change differently from what was certified, by more than {allowed:.0%}: {key!r} by "
                f"{changes[key][place]:.4g}, certified {certified[key]:.4g} ({what})"
            )
        largest = max([largest, *(errors[key] / max(changes[key][place], floor, 1e-30) for key in errors)])
    return Check(
        name,
        OK,
        f"the certificate's rows: {len(changes)} layers change as certified, the largest difference is {largest:.1%} (allowed: {TOLERANCE:.0%})",
    )
