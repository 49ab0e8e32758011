"""The pictures of a demo run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.plots import (
    answer_page_rows,
    plot_anchors,
    plot_answer_page,
    plot_probe_bars,
    plot_spectrum,
)
from ..evaluation.sentence_page import plot_sentence_page, sentence_page_rows
from ..records.folder import ANCHORS_PICTURE_NAME


if TYPE_CHECKING:
    from ..erasing import Erasure


def draw_pictures(erasure: Erasure, folder: Path) -> None:
    """Draws anchors, answers, sentences, probe bars and the spectrum of one layer as PNG files.

    Args:
        erasure ([`Erasure`]): Evaluated on the standard probes, with all answers.
        folder (`Path`): Where to; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer, anchors, report = erasure.trainer, erasure.anchors, erasure.report
    assert report is not None and report.results is not None and trainer.probes is not None
    concept, probes, (before, after) = report.concept, trainer.probes, report.results
    plot_anchors(anchors, folder / ANCHORS_PICTURE_NAME, concept=concept)
    plot_answer_page(answer_page_rows(probes, before, after), folder / "answers.png", concept=concept)
    plot_sentence_page(sentence_page_rows(probes, before, after), folder / "sentences.png", concept=concept)
    plot_probe_bars(report, folder / "probes.png")
    if trainer.null_spaces and erasure.certificate is not None:
        # The layer whose retained inputs change most is the one to look at.
        worst = erasure.certificate.worst(1)[0].name
        plot_spectrum(trainer.null_spaces[worst], folder / "spectrum.png", layer=worst)
