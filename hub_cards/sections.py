"""What the card's sections say, as plain values: the template puts them into words and escapes them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from space_peft.attacks.kinds import KINDS
from space_peft.evaluation.keys import KEYS
from space_peft.statistics.intervals import share_interval

from .facts import ErasureFacts


NEVER_TESTED = (
    "other languages than those of the probes' questions",
    "prompts with several images, video, longer conversations than those of the probes",
)
# They tell weights from others by a hash, which says nothing to a reader: whether the update is confined stands in the
# certificate's section, and the base model's commit in the table of its facts.
_IDENTITIES = ("projected", "revision", "identity")
# `max_lora_rank` takes one of these: https://docs.vllm.ai/en/stable/api/vllm/config/lora/
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def results_rows(facts: ErasureFacts) -> list[dict]:
    """One row a probe: `key`, `before`, `after`, their exact `interval_before` and `interval`, `accuracies` over all rows,
    `n`, `meaning`, `better`."""
    rows: list[dict] = []
    if facts.report is None:
        return rows
    for key, after in facts.report.after.items():
        if after["value"] is None:
            continue
        before, entry = facts.report.before.get(key, {}), KEYS.get(key)
        rows.append(
            {
                "key": key,
                "before": before.get("value"),
                "after": after["value"],
                "accuracies": [score.get("accuracy", {}) for score in (before, after)],
                # What is 1 by definition was not measured.
                "interval_before": None if entry and entry.kept else _interval(before),
                "interval": _interval(after),
                "n": after["n"],
                "meaning": entry.meaning if entry else "a probe of the author's",
                "better": entry.better if entry else "",
            }
        )
    return rows


def _interval(score: dict) -> tuple[float, float] | None:
    return share_interval(score["value"], score["n"]) if score.get("n") else None


def attack_rows(facts: ErasureFacts) -> list[dict]:
    """What was tried, as `attacks.json` has it, with a `label`, the exact `interval` of a value that is a share, and whether
    it was too `weak` to say anything."""
    return [
        {
            **found,
            "label": kind.label,
            "interval": _interval(found) if kind.is_share else None,
            "weak": kind.says_nothing(found),
        }
        for name, kind in KINDS.items()
        if (found := facts.attacks.get(name)) is not None
    ]


def untested_attacks(facts: ErasureFacts) -> list[tuple[str, str]]:
    """Attacks that were not tried, or were too weak: a name of each, and what is therefore not known."""
    tried = {name for name, found in facts.attacks.items() if not KINDS[name].says_nothing(found)}
    return [kind.untested for name, kind in KINDS.items() if kind.untested and name not in tried]


def not_tested(facts: ErasureFacts) -> list[str]:
    """What a reader must not assume: probes without rows, attacks not tried, and what the author names."""
    missing = [
        f"{key}: {entry.meaning}"
        for key, entry in KEYS.items()
        if facts.report is None or facts.report.after[key]["value"] is None
    ]
    attacks = [f"{what}: {unknown}" for what, unknown in untested_attacks(facts)]
    return [*missing, *attacks, *NEVER_TESTED, *facts.data.not_tested]


def certificate_summary(facts: ErasureFacts, worst: int = 5) -> dict | None:
    """Median over layers, and the layers that change most."""
    certificate = facts.certificate
    if certificate is None or not certificate.layers:
        return None
    columns = ("bound", "change", "relative_change")
    values = {column: [float(getattr(layer, column)) for layer in certificate.layers] for column in columns}
    return {
        "layers": len(certificate.layers),
        "median": {column: statistics.median(values[column]) for column in columns},
        "largest": max(values["relative_change"]),
        "worst": certificate.worst(worst),
        "within": sum(change <= bound for change, bound in zip(values["change"], values["bound"])),
        "by_image": certificate.held_out is not None and certificate.held_out.groups > 0,
        "end_to_end": certificate.end_to_end,
        "calibration": certificate.calibration,
        "fitted": certificate.fitted_counts,
        "measured": certificate.measured_counts,
    }


def anchors_summary(facts: ErasureFacts) -> dict | None:
    """Counts, scores and probabilities of the anchors; `None` for a method without anchors."""
    provenance = facts.provenance or {}
    rows = provenance.get("anchors")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return None
    captions = Counter(str(row["caption"]) for row in rows if row.get("caption"))
    excluded = provenance.get("excluded")
    excluded = excluded if isinstance(excluded, dict) else {}
    refinement, pool = provenance.get("refinement"), provenance.get("pool")
    pool = pool if isinstance(pool, dict) else {}
    return {
        "count": len(rows),
        "selected_by": provenance.get("method"),
        "encoder": provenance.get("encoder"),
        "pool": {key: pool.get(key) for key in ("rows", "fingerprint")},
        "threshold": provenance.get("threshold"),
        "upper_threshold": provenance.get("upper_threshold"),
        "excluded": sorted(excluded.items(), key=lambda pair: isinstance(pair[1], int) and -pair[1]),
        "score": _spread(rows, "score"),
        "before": _spread(rows, "p_name_before"),
        "after": _spread(rows, "p_name_after"),
        "refinement": _shown(refinement) if isinstance(refinement, dict) else {},
        "captions": [] if facts.redacted else captions.most_common(8),
    }


def _shown(settings: dict) -> dict:
    """The numbers among the settings: questions are long."""
    return {key: value for key, value in settings.items() if isinstance(value, (int, float))}


def _spread(rows: list[dict], key: str) -> dict | None:
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def settings_tables(facts: ErasureFacts) -> dict[str, dict]:
    """Settings that differ from the defaults, by config; those of the report where the trainer recorded none."""
    tables = {name: _without_identities(values) for name, values in facts.data.settings.items()}
    if not any(tables.values()) and facts.report and facts.report.settings:
        own = _without_identities(facts.report.settings)
        tables["Run"] = {key: value for key, value in own.items() if value not in (None, {}, [])}
    return {name: values for name, values in tables.items() if values}


def constraint_settings(facts: ErasureFacts) -> dict:
    """The settings of the constraint; empty for an adapter without one."""
    return _without_identities(facts.space or {})


def _without_identities(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _IDENTITIES}


def adapter_summary(facts: ErasureFacts) -> dict:
    """Rank, size and place of the adapter, and how vLLM takes it."""
    rank = facts.adapter.get("r")
    rank = rank if isinstance(rank, int) else None
    return {
        "rank": rank,
        "alpha": facts.adapter.get("lora_alpha"),
        "layers": len(facts.layers),
        "parameters": facts.parameters,
        "vision": facts.moves_vision,
        "vllm_rank": next((allowed for allowed in _VLLM_RANKS if rank and allowed >= rank), None),
    }


def run_summary(facts: ErasureFacts) -> dict:
    """Seed, steps, versions, hardware, time and date: from the trainer, else from the report."""
    data, report = facts.data, facts.report
    seconds = {**(report.seconds if report else {}), **data.seconds}
    devices = data.hardware.get("devices")
    return {
        "seed": data.seed if data.seed is not None else report and report.seed,
        "steps": data.steps if data.steps is not None else report and report.settings.get("steps"),
        "versions": {k: v for k, v in (data.versions or (report.versions if report else {})).items() if v},
        "devices": devices if isinstance(devices, dict) else {},
        "processes": data.hardware.get("processes"),
        "seconds": seconds,
        "created": data.created,
    }
