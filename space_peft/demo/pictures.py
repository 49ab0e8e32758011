"""The pictures of a demo run."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.plots import (
    answer_page_rows,
    plot_anchor_grid,
    plot_answer_page,
    plot_probe_bars,
    plot_spectrum,
)
from ..evaluation.sentence_page import plot_sentence_page, sentence_page_rows


def draw_pictures(run, folder: Path) -> None:
    """Draws anchors, answers, sentences, probe bars and the spectrum of one layer as PNG files.

    Args:
        run ([`~space_peft.demo.pipeline.DemoRun`]): A finished run.
        folder (`Path`): Where to; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    concept = run.report.concept
    plot_anchor_grid(run.raw, run.refined, folder / "anchors.png", concept=concept)
    rows = answer_page_rows(run.probes, run.before, run.after)
    plot_answer_page(rows, folder / "answers.png", concept=concept)
    sentences = sentence_page_rows(run.probes, run.before, run.after)
    plot_sentence_page(sentences, folder / "sentences.png", concept=concept)
    plot_probe_bars(run.report, folder / "probes.png")
    if run.trainer.null_spaces:
        # The layer whose retained inputs change most is the one to look at.
        worst = run.trainer.certificate.worst(1)[0].name
        plot_spectrum(run.trainer.null_spaces[worst], folder / "spectrum.png", layer=worst)
