"""The result in one picture: what was known before and after, for each place of the adapter."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from space_peft.figures.style import BEFORE, FORGET, INK, KEEP, save_figure, styled


BARS = (
    ("forget", "target named"),
    ("generality", "target named,\nheld-out wordings"),
    ("retain", "kept: other concepts"),
    ("retain_unseen_style", "kept: unseen style"),
    ("siblings", "kept: same kind"),
    ("target_tokens", "target in words:\nanswer tokens kept"),
    ("world_right", "world knowledge:\nright of ten"),
)
TITLES = {
    "vision": "LoRA on tower and projector",
    "vision, smaller steps": "the same, learning rate 1e-3",
    "language": "LoRA on the language model",
    "language, strength 1": "the same, strength t = 1",
    "language, all eigenvectors": "t = 0.3, all eigenvectors",
}


def _value(scores: dict, key: str) -> float | None:
    score = scores[key]
    if key == "world_right":
        return score / 10
    return score["value"] if isinstance(score, dict) else score


def draw(content: dict, path: Path) -> None:
    """Draws bars of the mean over concepts, a dot a concept, and the perplexities in words.

    Args:
        content (`dict`): What `erase.py` writes.
        path (`Path`): PNG file.
    """
    variants = list(dict.fromkeys(result["variant"] for result in content["erasures"]))
    with styled():
        figure = Figure(figsize=(2.5 + 3.3 * len(variants), 5.4), layout="constrained")
        panels = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
        for axes, variant in zip(panels, variants):
            results = [result for result in content["erasures"] if result["variant"] == variant]
            for place, (key, _) in enumerate(BARS):
                y = place + (0.5 if place > 1 else 0)
                colour = FORGET if place < 2 else KEEP
                for when, offset, fill in (("before", -0.19, BEFORE), ("after", 0.19, colour)):
                    values = [value for result in results if (value := _value(result[when], key)) is not None]
                    if not values:  # nothing of this was known before
                        continue
                    mean = sum(values) / len(values)
                    axes.barh(y + offset, mean, height=0.36, color=fill)
                    axes.plot(values, [y + offset] * len(values), "o", color=INK, markersize=2.5, clip_on=False)
                    axes.text(1.06, y + offset, f"{mean:.2f}", va="center", fontsize=8, color=INK)
            ppl = [sum(r[when]["perplexity"] for r in results) / len(results) for when in ("before", "after")]
            steps = ", ".join(str(result["steps"]) for result in results)
            axes.set_title(
                f"{TITLES[variant]}\nperplexity {ppl[0]:.2f} → {ppl[1]:.2f}; steps {steps}", loc="left", fontsize=9
            )
            axes.set(xlim=(0, 1.0), xlabel="share")
            axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks([i + (0.5 if i > 1 else 0) for i in range(len(BARS))], [label for _, label in BARS])
        panels[0].invert_yaxis()
        concepts = list(dict.fromkeys(result["concept"] for result in content["erasures"]))
        figure.suptitle(
            f"EfficientNet-Lite0 + SmolLM2-135M: {', '.join(concepts)} erased one at a time (dots)",
            x=0.01, ha="left", fontsize=12, weight="bold",
        )  # fmt: skip
        handles = [
            Patch(color=BEFORE, label="before"),
            Patch(color=FORGET, label="after (should be 0)"),
            Patch(color=KEEP, label="after (should stay)"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        save_figure(figure, path, 130)
