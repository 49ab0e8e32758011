"""Several splits of one model together: forget quality, model utility, leakage, against a retain-only model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.io import write_json
from . import statistics
from .report import SuiteReport
from .schema import IMAGE_TEXT, TEXT_ONLY
from .scoring import ALL, PARAPHRASED


@dataclass(frozen=True)
class SuiteSummary:
    """What an unlearned model is judged by.

    Args:
        suite (`str`): The suite's name.
        utility (`float`, *optional*): Harmonic mean of `utility_terms`; None without a kept split.
        utility_terms (`dict[str, float]`): `"split / task / metric"` -> value, everything that utility is the mean of.
        forget_quality (`dict`): By modality: `ks` and `js` of the forget split; None without a retain-only model.
        privleak (`float`, *optional*): In percent; None without a retain-only model and a holdout split.
        auc (`dict`): Of the membership attack behind it: `model` and `reference`.
        reports (`dict[str, SuiteReport]`): By split.
    """

    suite: str
    utility: float | None
    utility_terms: Mapping[str, float]
    forget_quality: Mapping[str, Mapping[str, float | None]]
    privleak: float | None
    auc: Mapping[str, float | None]
    reports: Mapping[str, SuiteReport] = field(repr=False, default_factory=dict)

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Ready for JSON.

        Args:
            rows (`bool`, defaults to `True`): With every answer of every split.
        """
        keys = ("suite", "utility", "utility_terms", "forget_quality", "privleak", "auc")
        splits = {}
        for split, report in self.reports.items():
            content = report.to_dict()
            splits[split] = content if rows else {key: content[key] for key in content if key != "rows"}
        return {**{key: getattr(self, key) for key in keys}, "splits": splits}

    def to_table(self) -> str:
        """What the summary says in a few lines, then the table of each split."""
        lines = [
            f"{self.suite}: model utility {_text(self.utility)} (harmonic mean of {len(self.utility_terms)} terms)"
        ]
        for modality, values in self.forget_quality.items():
            lines.append(
                f"forget quality, {modality}: KS p-value {_text(values['ks'])}, Jensen-Shannon {_text(values['js'])} bits"
            )
        lines.append("privleak: " + ("-" if self.privleak is None else f"{self.privleak:.1f} %"))
        return "\n\n".join(["\n".join(lines), *(report.to_table() for report in self.reports.values())])

    def save(self, path: str | os.PathLike) -> Path:
        """Writes one JSON file with everything, all or nothing."""
        write_json(path, self.to_dict())
        return Path(path)


def summarize(reports: Mapping[str, SuiteReport], reference: Mapping[str, SuiteReport] | None = None) -> SuiteSummary:
    """Brings the splits of one model together.

    Args:
        reports (`dict[str, SuiteReport]`): By split, of the model that forgot; see `evaluate_suite`.
        reference (`dict[str, SuiteReport]`, *optional*): The same splits of a model that was trained without the forgotten
            people; needed are `"forget"` and, for privleak, `"holdout"`.

    Returns:
        [`SuiteSummary`]

    Raises:
        ValueError: If there are no reports, they are of several suites, or the reference was asked other questions.
    """
    if not reports:
        raise ValueError("got no reports; expected one a split.")
    if len(names := {report.suite for report in reports.values()}) > 1:
        raise ValueError(f"the reports are of several suites: {sorted(names)}.")
    for split, report in reports.items():
        if report.split != split:
            raise ValueError(f"the report of {split!r} is one of the split {report.split!r}.")
        if reference is not None and split in reference:
            reference[split].check_same(report.fingerprint, f"reference[{split!r}]")
    terms: dict[str, Any] = {}
    for split, report in reports.items():
        if split in ("retain", "real"):
            terms |= utility_terms(report)
    forget, gold = reports.get("forget"), (reference or {}).get("forget")
    leak = _auc(forget, reports.get("holdout"))
    gold_leak = _auc(gold, (reference or {}).get("holdout"))
    return SuiteSummary(
        names.pop(),
        statistics.harmonic_mean(terms),
        terms,
        {} if forget is None else _forget_quality(forget, gold),
        statistics.privleak(leak, gold_leak),
        {"model": leak, "reference": gold_leak},
        dict(reports),
    )


def utility_terms(report: SuiteReport) -> dict[str, float]:
    """What a kept split adds to model utility: `"split / task / metric"` -> value, modalities together.

    A classification gives its accuracy, every other task probability, ROUGE-L and, where there are wrong answers, the truth
    ratio. Of people known from elsewhere ("real") the probability is that among right and wrong answers. Paraphrased
    questions, which are the same facts again, give none.
    """
    terms: dict[str, Any] = {}
    rouge = "rouge_l_recall" if report.settings["protocol"]["rouge"] == "recall" else "rouge_l"
    for task in dict.fromkeys(row["task"] for row in report.rows if not row["task"].endswith(PARAPHRASED)):
        cells = {
            cell["metric"]: cell["value"] for cell in report.scores if cell["task"] == task and _whole(report, cell)
        }
        among = report.split == "real" and "probability_among" in cells
        if "accuracy" in cells:
            found = {"accuracy": cells["accuracy"]}
        else:
            found = {
                "probability": cells["probability_among" if among else "probability"],
                "rouge": cells[rouge],
                **({"truth_ratio": cells["truth_ratio"]} if "truth_ratio" in cells else {}),
            }
        terms |= {f"{report.split} / {task} / {metric}": value for metric, value in found.items()}
    return terms


def _whole(report: SuiteReport, cell: Mapping) -> bool:
    """Whether a cell is of all modalities: that of "all", or of the only one."""
    shown = {other["modality"] for other in report.scores}
    return cell["modality"] == (ALL if ALL in shown else next(iter(shown)))


def _forget_quality(report: SuiteReport, gold: SuiteReport | None) -> dict[str, dict[str, float | None]]:
    found = {}
    for modality in (IMAGE_TEXT, TEXT_ONLY, ALL):
        part, other = (
            None
            if which is None
            else [
                row["truth_ratio"]
                for row in which.rows
                if row.get("truth_ratio") is not None and modality in (ALL, row["modality"])
            ]
            for which in (report, gold)
        )
        if part:
            found[modality] = {"ks": statistics.ks_p_value(part, other), "js": statistics.js_divergence(part, other)}
    return found


def _auc(forget: SuiteReport | None, holdout: SuiteReport | None) -> float | None:
    if forget is None or holdout is None:
        return None
    members, others = (
        [row["min_k"] for row in report.rows if row.get("min_k") is not None] for report in (forget, holdout)
    )
    return statistics.auc(members, others)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
