"""What a trainer measures of a finished erasure: certificate, end-to-end statement, canary."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from space_peft.canary.check import Canary, make_canary
from space_peft.null_space.certificate import RetentionCertificate, measure_certificate
from space_peft.records.stages import begin, done
from space_peft.retained.end_to_end import EndToEnd, measure_end_to_end
from space_peft.retained.held_out import HeldOut, content_keys, first_seen, split_by_content, warn_if_few
from space_peft.retained.reading import RetainedRows

from .parts import TrainerPart


if TYPE_CHECKING:
    from datasets import Dataset


class CertifyingMixin(TrainerPart):
    """
    Base of the erasure trainers, before [`~transformers.Trainer`]: which rows are held out, and what is measured on them.

    Attributes:
        certificate ([`RetentionCertificate`], *optional*): Of the adapter as training or `calibrate` left it.
        canary ([`Canary`], *optional*): Of the same.
    """

    certificate: RetentionCertificate | None = None
    canary: Canary | None = None
    _measured_on: str | None = None  # The digest of the adapter that both are of.
    _chosen_on_held_out: str | None = None  # Of one whose scale the held-out rows have chosen.

    def _split(self, args, *, constrained: bool) -> tuple[list[int], list[int]]:
        """Retained rows for fitting and training, and those held out: they share no image and no text."""
        share, every = args.certificate_share, list(range(len(self.retained)))
        keys = content_keys(self.retained) if share else []
        self._held_out = HeldOut(len(every), share, args.seed, len(set(keys)))
        fitted, held_out = split_by_content(keys, share, args.seed) if share else (every, [])
        if constrained and every:
            images = len({key for key in keys if key[0] == "image"})
            warn_if_few(self._held_out.groups, len({keys[row] for row in held_out}), share, images)
        return fitted, held_out

    def _certify(self, end_to_end: bool = True) -> None:
        """Measures the adapter as it is: all that was measured of another one is dropped."""
        began = time.perf_counter()
        self.certificate = self.canary = None
        self._measured_on = self._weights_now()
        model = self.accelerator.unwrap_model(self.model)
        if self.null_spaces and len(self.held_out.dataset):
            begin("certify")
            self.certificate = measure_certificate(
                model, self.null_spaces, self.held_out, progress=not self.args.disable_tqdm, held_out=self._held_out
            )
            if end_to_end:
                self.measure_end_to_end()
            done(f"measured what changed on {len(self.held_out.dataset)} held-out rows")
        if self.args.canary_items:
            begin("canary")
            options = {"seeds": self.args.canary_items, "images": self.args.canary_items, "seed": self.args.seed}
            self.canary = make_canary(
                model, self.processing_class, questions=self.questions, names=[self.concept, *self.aliases],
                anchors=self.anchors, **options,
            )  # fmt: skip
            done(f"noted {len(self.canary.items)} answers by which a loaded copy is checked")
        self.card_data.seconds["certificate"] = round(time.perf_counter() - began, 1)

    def measure_end_to_end(self, rows: Dataset | Sequence[dict] | None = None) -> EndToEnd | None:
        """How many greedy answers the adapter changes, on held-out images and texts; kept in the certificate, if any.

        Images that the deployed model answers about with the concept's name are left out: that answer is to change.

        Args:
            rows ([`~datasets.Dataset`] or `list[dict]`, *optional*):
                Rows in the formats of `retain_dataset`, drawn from where the claim is to hold; by default the retained
                rows that were held out from fitting and training.

        Returns:
            [`EndToEnd`]: `None` if no rows were held out, or none is left.

        Raises:
            ValueError: If a row shares its image or its text with one that the adapter was fitted to or trained on, or no
                rows are given and `calibrate` has chosen the adapter's scale on those that were held out.
        """
        if rows is None and self._chosen_on_held_out == self._weights_now():
            raise ValueError(
                "the held-out rows were used to choose this adapter's scale, so they give no bound: pass others."
            )
        retained, chosen = self._unseen(rows)
        model, names = self.accelerator.unwrap_model(self.model), [self.concept, *self.aliases]
        result = measure_end_to_end(
            model, self.processing_class, retained, chosen, seed=self.args.seed, names=names,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )  # fmt: skip
        if self.certificate is not None and self._measured_on == self._weights_now():
            self.certificate = dataclasses.replace(self.certificate, end_to_end=result)
        return result

    def _unseen(self, rows: Dataset | Sequence[dict] | None) -> tuple[RetainedRows, list[int]]:
        """Data, and which of its rows were held out: those given, after a check, or the retained ones that were."""
        if rows is None:
            shown = self.retained.has_image()
            # Which of them are drawn must not depend on how they are put into batches.
            return self.retained, sorted(self.held_out.dataset.indices, key=lambda row: (shown[row], row))
        rows, held_out = RetainedRows(rows), set(self.held_out.dataset.indices)
        trained_on = [row for row in range(len(self.retained)) if row not in held_out]
        if (seen := first_seen(rows, self.retained, trained_on)) is not None:
            raise ValueError(
                f"row {seen[0]} shares its {seen[1]} with a retained row that the adapter was fitted to or trained on, so "
                "it says nothing of others; leave it out."
            )
        return rows, list(range(len(rows)))
