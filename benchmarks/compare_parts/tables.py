"""From runs to figures: trade-off curves, hypervolume, intervals, tables."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap

import numpy as np

from .methods import ATTACKED, whole_of


REFERENCE = 0.9
"""Retention at which the hypervolume begins: below it nobody would deploy the model."""
DEPTH_PAIRS = {
    "audit (before)": ("audit", "audit_before"),
    "relearned, merged (control)": ("relearn", "relearn_control"),
    "adapter, 5 steps (control)": ("relearn_adapter_5", "relearn_adapter_5_control"),
    "adapter, 10 steps (control)": ("relearn_adapter", "relearn_adapter_control"),
    "p(yes) (absent names)": ("confirm", "confirm_control"),
}
"""Attacks, and what each is seen beside."""
PRECISIONS = ("full", "int8", "int4")


def mean_curve(rows: list[dict]) -> list[dict]:
    """The mean over concepts of every column, scale by scale; a concept is the mean of its runs, however many."""
    # Not every column in every run: the first ones of the search are from before the divergence was measured.
    columns = [key for key in rows[0]["curve"][0] if all(key in row["curve"][0] for row in rows)]

    def mean(curves: list[list[dict]]) -> list[dict]:
        return [{key: statistics.fmean(p[key] for p in points) for key in columns} for points in zip(*curves)]

    concepts = dict.fromkeys(row["concept"] for row in rows)
    return mean([mean([row["curve"] for row in rows if row["concept"] == concept]) for concept in concepts])


def hypervolume(points: list[tuple[float, float]], reference: float = REFERENCE) -> float:
    """Area dominated by `(forget, retain)` points (less is better, more is better), as a share of the largest possible.

    Args:
        points (`list[tuple[float, float]]`): In [0, 1].
        reference (`float`): Retention of the reference point; its forgetting is 1 (everything is still named).
    """
    area, reached = 0.0, reference
    for forget, retain in sorted(points):
        if retain > reached:
            area += (1 - forget) * (retain - reached)
            reached = retain
    return area / (1 - reference)


def curve_hypervolume(curve: list[dict]) -> float:
    return hypervolume([(point["forget"], point["retain_all"]) for point in curve])


def _resampled_volumes(rows: list[dict], concepts: list[str], resamples: int, seed: int) -> np.ndarray:
    """Hypervolumes of mean curves over concepts drawn with replacement, with all their seeds; the same draws every time."""
    own = {c: [row for row in rows if row["concept"] == c] for c in concepts}
    curves = np.array([[[p["forget"], p["retain_all"]] for p in mean_curve(own[c])] for c in concepts])
    draws = np.random.default_rng(seed).integers(0, len(concepts), (resamples, len(concepts)))
    return np.array([hypervolume([tuple(point) for point in curves[draw].mean(axis=0)]) for draw in draws])


def hypervolume_interval(rows: list[dict], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean curve's hypervolume."""
    concepts = list(dict.fromkeys(row["concept"] for row in rows))
    low, high = np.percentile(_resampled_volumes(rows, concepts, resamples, seed), [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def hypervolume_difference(rows: list[dict], others: list[dict], resamples: int = 1000, seed: int = 0) -> dict:
    """How much larger one method's hypervolume is than another's, on the runs that both have.

    Returns:
        `dict`: `mean`, and `ci95`, the 95 % bootstrap interval over concepts, which are drawn for both alike.
    """
    shared = {(row["concept"], row["seed"]) for row in rows} & {(row["concept"], row["seed"]) for row in others}
    rows, others = ([r for r in own if (r["concept"], r["seed"]) in shared] for own in (rows, others))
    concepts = sorted({concept for concept, _ in shared})
    values = _resampled_volumes(rows, concepts, resamples, seed) - _resampled_volumes(others, concepts, resamples, seed)
    mean = curve_hypervolume(mean_curve(rows)) - curve_hypervolume(mean_curve(others))
    return {"mean": round(mean, 4), "ci95": [round(float(edge), 4) for edge in np.percentile(values, [2.5, 97.5])]}


def at_retention(curve: list[dict], wanted: float) -> dict:
    """The point of a curve that forgets most among those that retain at least `wanted`."""
    allowed = [point for point in curve if point["retain_all"] >= wanted]
    return min(allowed, key=lambda point: (point["forget"], -point["retain_all"]))


def divergence_at(curve: list[dict], probability: float = 0.01) -> float | None:
    """How far answers about other images have moved where the target's name is down to a probability.

    Along a curve the name's mean log p falls about linearly with the scale and the divergence rises with its square, so
    between two points its root is interpolated.

    Returns:
        `float` or None: Mean KL divergence in nats; None if the name is likelier at every scale.
    """
    wanted = math.log(probability)
    for first, second in itertools.pairwise(curve):
        high, low = first["name_log_prob"], second["name_log_prob"]
        if low <= wanted < high:
            share = (high - wanted) / (high - low)
            root = (1 - share) * max(first["divergence"], 0.0) ** 0.5 + share * max(second["divergence"], 0.0) ** 0.5
            return root**2
    return None


def over_concepts(rows: list[dict], value) -> dict:
    """Mean, and a 95 % interval from the standard error over concepts (seeds of one concept are not independent)."""
    values = {}
    for row in rows:
        if value(row) is not None:
            values.setdefault(row["concept"], []).append(value(row))
    means = [statistics.fmean(own) for own in values.values()]
    if not means:
        return {"mean": None, "ci95": None}
    half = 1.96 * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return {"mean": round(statistics.fmean(means), 4), "ci95": None if half is None else round(half, 4)}


def summarise(rows: list[dict], families: dict[str, list[str]]) -> dict:
    """What the JSON says of one method."""
    curve = mean_curve(rows)
    scores = [key for key in rows[0].get("scores", {})]
    deep = [flat_depth(row) for row in rows if row.get("depth")]
    attacks = [*(key for pair in DEPTH_PAIRS.values() for key in pair), *PRECISIONS]
    depth = {key: over_concepts(deep, lambda row, key=key: row[key]) for key in attacks} if deep else {}
    point = at_retention(curve, 0.985)
    return {
        "settings": rows[0]["settings"],
        "runs": len(rows),
        "concepts": len({row["concept"] for row in rows}),
        "hypervolume": round(curve_hypervolume(curve), 4),
        "hypervolume_ci95": hypervolume_interval(rows),
        "at_retain_0985": {key: round(point[key], 4) for key in ("forget", "retain_all", "scale")},
        "divergence_at_p_001": {
            **over_concepts(rows, lambda row: divergence_at(row["curve"])),
            "reached": sum(divergence_at(row["curve"]) is not None for row in rows),
        },
        "scores": {key: over_concepts(rows, lambda row, key=key: row["scores"][key]) for key in scores},
        "families": {
            family: {
                key: over_concepts([row for row in rows if row["concept"] in members], lambda row, key=key: row["scores"][key])
                for key in ("forget", "generality", "siblings")
            }
            for family, members in families.items()
            if scores
        },
        "entropy": _entropy([row["entropy"] for row in rows if "entropy" in row]),
        "curve": [{key: round(value, 4) for key, value in p.items()} for p in curve],
        "steps": round(statistics.fmean(row["steps"] for row in rows), 1),
        "seconds": {
            key: round(statistics.fmean(row["seconds"][key] for row in rows), 1) for key in rows[0]["seconds"]
        },
        "depth": {key: value["mean"] for key, value in depth.items()} or None,
        "depth_ci95": {key: value["ci95"] for key, value in depth.items()} or None,
    }  # fmt: skip


def flat_depth(row: dict) -> dict:
    """The attacks on one run; of the adapter's relearning also what is back after five steps, where few are at 1 yet."""
    relearned, control = next(shares for step, *shares in row["depth"]["curves"]["adapter"] if step == 5)
    own = {"relearn_adapter_5": relearned, "relearn_adapter_5_control": control}
    return {"concept": row["concept"], **row["depth"], **own}


def _entropy(found: list[dict]) -> dict[str, list[float]] | None:
    """Mean spectral entropy of each set of images, before and after."""
    if not found:
        return None
    return {key: [round(statistics.fmean(e[key][i] for e in found), 4) for i in (0, 1)] for key in found[0]}


def _cell(value: dict, digits: int = 3) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.{digits}f}" + ("" if value["ci95"] is None else f" ± {value['ci95']:.{digits}f}")


def _divergence(result: dict) -> str:
    value = result["divergence_at_p_001"]
    missed = result["runs"] - value["reached"]
    return _cell(value, digits=4) + (f" ({missed} of {result['runs']} never)" if missed else "")


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    if any(len(cells) != len(header) for cells in lines):
        raise ValueError(f"every line must have the {len(header)} cells of the header {header}.")
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


SCORES = {
    "forget": "forget", "generality": "generality", "free_form": "sentences", "retain": "retain",
    "retain_sentences": "retain, sentences", "retain_unseen_style": "unseen style",
    "siblings": "siblings", "text": "text", "text_target": "text about it", "fluency": "fluency",
}  # fmt: skip


GOALS = {
    "forget": ("the concept's images still named, none of them seen by the erasure", "≤ 0.02"),
    "generality": ("the same under 8 other wordings and 2 other yes/no questions", "≤ 0.05"),
    "free_form": (
        "the same in sentences: 8 open prompts, a second turn, a system prompt and a story among them",
        "≤ 0.02",
    ),
    "retain": ("other images still answered, trained styles", "≥ 0.985"),
    "retain_sentences": ("other images still named in sentences", "≥ 0.98"),
    "retain_unseen_style": ("the same in a style the model was never trained on", "≥ 0.97"),
    "siblings": ("images of the same kind still answered", "≥ 0.97"),
    "text": ("questions without image about other concepts", "≥ 0.99"),
    "text_target": ("questions without image about the concept", "≥ 0.99"),
    "fluency": ("a valid name or kind, or a refusal", "≥ 0.97"),
}
"""What each probe asks, and what was to be reached."""


def demo_table(content: dict) -> str:
    """Markdown: the library's defaults on the embedded model, one line a probe, beside what was to be reached.

    Args:
        content (`dict`): Of `benchmarks/results/erase_demo.json`.
    """
    lines = []
    for key, (asked, goal) in GOALS.items():
        error = content["stderr"][key]
        spread = "" if error is None else f" ± {1.96 * error:.3f}"
        lines.append([f"{SCORES[key]}: {asked}", f"{content['mean'][key]:.3f}{spread}", goal])
    return _markdown(["probe", "after", "goal"], lines)


def main_table(methods: dict[str, dict]) -> str:
    """Markdown: forgetting and retention, one line a method; ± is half of a 95 % interval over concepts."""
    header = [
        "method",
        "sees it",
        "hypervolume (95 %)",
        "forget at retain ≥ 0.985",
        "KL at p = 0.01",
        *SCORES.values(),
        "steps",
        "seconds",
    ]
    lines = []
    for name, result in methods.items():
        low, high = result["hypervolume_ci95"]
        lines.append(
            [
                name,
                "yes" if result["sees_images"] else "no",
                f"{result['hypervolume']:.3f} ({low:.3f} to {high:.3f})",
                f"{result['at_retain_0985']['forget']:.3f}",
                _divergence(result),
                *(_cell(result["scores"][key]) if result["scores"] else "-" for key in SCORES),
                f"{result['steps']:.0f}",
                f"{sum(result['seconds'].values()):.0f}",
            ]
        )
    return _markdown(header, lines)


def depth_table(methods: dict[str, dict]) -> str:
    """Markdown: the attacks, one line a method."""
    header = ["method", *DEPTH_PAIRS, "named: full", "int8", "int4"]
    lines = []
    for name, result in methods.items():
        if depth := result["depth"]:
            cells = [f"{depth[key]:.3f} ({depth[control]:.3f})" for key, control in DEPTH_PAIRS.values()]
            lines.append([name, *cells, *(f"{depth[key]:.3f}" for key in PRECISIONS)])
    return _markdown(header, lines)


def family_table(methods: dict[str, dict]) -> str:
    """Markdown: concepts with and without a close sibling."""
    families = list(next(iter(methods.values()))["families"])
    keys = ("forget", "generality", "siblings")
    header = ["method", *(f"{key}, {family}" for family in families for key in keys)]
    lines = [
        [name, *(_cell(result["families"][family][key]) for family in families for key in keys)]
        for name, result in methods.items()
        if result["families"]
    ]
    return _markdown(header, lines)


def parts_table(parts: dict[str, dict]) -> str:
    """Markdown: methods with one part changed, beside the whole on the same concepts and seed."""
    header = ["variant", "hypervolume", *SCORES.values(), "steps"]
    lines = []
    for name, result in parts.items():
        cells = [_cell(result["scores"][key]) for key in SCORES]
        lines.append([name, f"{result['hypervolume']:.3f}", *cells, f"{result['steps']:.0f}"])
    return _markdown(header, lines)


def entropy_table(parts: dict[str, dict]) -> str:
    """Markdown: spectral entropy of image features after the erasure, and before, on the same images."""
    found = {name: result["entropy"] for name, result in parts.items() if result["entropy"]}
    sets = list(next(iter(found.values())))
    lines = [[name, *(f"{own[key][1]:.3f} ({own[key][0]:.3f})" for key in sets)] for name, own in found.items()]
    return _markdown(["variant", *(f"{key}, after (before)" for key in sets)], lines)


def paired_table(differences: dict[str, dict]) -> str:
    """Markdown: how much larger SPACE's hypervolume is than each other method's."""
    lines = [[name, f"{d['mean']:.3f}", f"{d['ci95'][0]:.3f} to {d['ci95'][1]:.3f}"] for name, d in differences.items()]
    return _markdown(["SPACE's hypervolume less that of", "mean", "95 %, drawn in pairs"], lines)


def _place(difference: dict) -> str:
    """What the 95 % interval of a difference allows to say."""
    low, high = difference["ci95"]
    return "ahead of" if low > 0 else "behind" if high < 0 else "level with"


def lead(results: dict) -> str:
    """A few sentences: SPACE beside the best of those that see the target's images, and beside the others."""
    methods, differences = results["methods"], results["hypervolume_above"]
    seeing = [name for name in differences if methods[name]["sees_images"]]
    best = max(seeing, key=lambda name: methods[name]["hypervolume"])
    own, other, difference = methods["SPACE"], methods[best], differences[best]
    size = "larger" if difference["mean"] >= 0 else "smaller"
    low, high = difference["ci95"]
    forget, moved = "at_retain_0985", "divergence_at_p_001"
    text = (
        f"**SPACE sees no image of the target. It is {_place(difference)} the best method that does, {best}.** SPACE's "
        f"hypervolume is {size} by {abs(difference['mean']):.3f} (95 % interval, drawn in pairs: {low:.3f} to {high:.3f}). At a "
        f"retention of 0.985 SPACE still names {own[forget]['forget']:.3f} and {best} {other[forget]['forget']:.3f}. To bring "
        f"the name down to p = 0.01, SPACE moves other answers by {own[moved]['mean']:.4f} nats and {best} by "
        f"{other[moved]['mean']:.4f}."
    )
    others = {name: _place(difference) for name, difference in differences.items() if name != best}
    places = {place: [name for name in others if others[name] == place] for place in dict.fromkeys(others.values())}
    if places:
        text += " Beside the others, SPACE is "
        text += ", and ".join(f"{place} {', '.join(names)}" for place, names in places.items()) + "."
    return textwrap.fill(text, 124)


def tables(results: dict) -> dict[str, str]:
    """Every table of the JSON, by the name of its block in the README."""
    methods = results.get("methods", {})
    made = {"compare": main_table(methods), "depth": depth_table(methods)}
    if results.get("hypervolume_above"):
        made["paired"] = paired_table(results["hypervolume_above"])
        if any(methods[name]["sees_images"] for name in results["hypervolume_above"]):
            made["lead"] = lead(results)
    if any(result["families"] for result in methods.values()):
        made["families"] = family_table(methods)
    if results.get("parts"):
        made["parts"] = parts_table(results["parts"])
        attacked = {name: r for name, r in results["parts"].items() if name in ATTACKED and r["depth"]}
        if attacked:
            made["parts_depth"] = depth_table({whole_of(n): results["parts"][whole_of(n)] for n in attacked} | attacked)
        if any(result["entropy"] for result in results["parts"].values()):
            made["entropy"] = entropy_table(results["parts"])
    if results.get("longer"):
        made["longer"] = parts_table(results["longer"])
    return made
