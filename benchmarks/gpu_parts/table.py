"""The table of `benchmarks/results/gpu.json`, as Markdown."""

from __future__ import annotations

from collections.abc import Callable


def _seconds(key: str) -> Callable[[dict], str]:
    def shown(run: dict) -> str:
        one = run.get(key)
        if one is None:
            return "-"
        memory = "" if one.get("peak_gib") is None else f", {one['peak_gib']:.1f} GiB"
        return f"{one['seconds']:.3g} s{memory}"

    return shown


def _step(kind: str) -> Callable[[dict], str]:
    return lambda run: _seconds(kind)(run.get("steps", {}))


def _ratio(key: str) -> Callable[[dict], str]:
    return lambda run: f"{run[key]:.2f}" if key in run else "-"


def _kernels(run: dict) -> str:
    found = run.get("kernels")
    if found is None:
        return "-"
    return f"{sum(found['waits'].values())} and {sum(found['float64'].values())}"


def _two(run: dict) -> str:
    both = run.get("two_processes")
    if both is None:
        return "-"
    return "failed" if "failed" in both else _step("soft")(both)


ROWS: dict[str, Callable[[dict], str]] = {
    "a step of a plain LoRA": _step("plain"),
    "a step of SPACE without the constraint": _step("none"),
    "a step of SPACE": _step("soft"),
    "ratio to without the constraint": _ratio("step_ratio"),
    "ratio to the plain LoRA": _ratio("step_ratio_vs_plain_lora"),
    "the same step in two processes": _two,
    "a bare forward pass": _seconds("forward"),
    "statistics in the same pass": _seconds("statistics"),
    "ratio to the bare pass": _ratio("fit_ratio"),
    "decomposition": _seconds("decomposition"),
    "asking": _seconds("asking"),
    "refinement": _seconds("refinement"),
    "whole erasure, with retained rows": _seconds("erasure"),
    "statistics, once a model": _seconds("collect_statistics"),
    "whole erasure, from statistics alone": _seconds("erasure_from_statistics"),
    "waits and float64 kernels of ours in a step": _kernels,
}


def table(content: dict) -> str:
    """A column for each run, a row for each measurement, and what is smaller than was asked for below."""
    runs = content["runs"]
    names = [f"{run['setting'].get('shape', run['setting']['wanted'])}, {run['setting']['bits']} bits" for run in runs]
    machine = content["machine"]
    where = (
        f"{machine['card']} ({machine['memory_gib']} GiB)" if "card" in machine else "no card: a smoke test on a CPU"
    )
    lines = [f"{where}, PyTorch {machine['torch']}", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(runs)]
    for label, shown in ROWS.items():
        cells = [shown(run) for run in runs]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    notes = [f"{name}: {run['setting']['said']}." for name, run in zip(names, runs) if run["setting"].get("said")]
    if tpas := content.get("tpas"):
        notes.append(
            f"TPAS over {tpas['rows']:,} embeddings of length {tpas['dim']}: {tpas['from_files']['seconds']:.3g} s from its files; "
            f"scores and shortlist alone, on the device: {tpas['scores_on_device']['seconds']:.3g} s."
        )
    return "\n".join([*lines, *(["", *notes] if notes else [])])
