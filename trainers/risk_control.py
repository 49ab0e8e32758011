"""`calibrate`: the adapter as strong as a user's risk allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.utils.logging import get_logger

from space_peft.distributed import processes
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.retained.end_to_end import MAX_NEW_TOKENS, AnswerComparison, one_row_each
from space_peft.retained.held_out import first_seen
from space_peft.statistics.calibration import (
    DELTA,
    SCALES,
    Calibration,
    check_risk,
    check_scales,
    choose,
    items_needed,
    try_scales,
)

from .given_adapter import ADAPTER


if TYPE_CHECKING:
    from datasets import Dataset

    from .erasure_trainer import ErasureTrainer


logger = get_logger(__name__)


def calibrate(
    trainer: ErasureTrainer,
    risk: float = 0.01,
    rows: Dataset | Sequence[dict] | None = None,
    *,
    delta: float = DELTA,
    scales: Sequence[float] = SCALES,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Calibration:
    """Makes a trained adapter as strong as it can be shown to be without changing more than a share of retained answers.

    The update is multiplied by the largest scale for which that is shown on held-out data, by Learn-then-Test (see
    `statistics.calibration`): with probability `1 - delta`, at most a share `risk` of the greedy answers to questions
    about images and texts drawn like these are other ones than the deployed model's. One question is asked about each
    distinct image and text; images that the deployed model answers about with the concept's name are left out.

    The scale goes into the weights (`lora_B`), so that everybody who loads the adapter has it. Certificate and canary are
    made again of the weights as they are then, the guarantee is in the certificate and on the card, and nothing that was
    measured before is saved any more: evaluate again, then call `trainer.save_model()`. Where some of the trainer's own
    held-out rows are used, the certificate has no end-to-end statement: its bound is none on rows that chose the weights.

    Args:
        trainer ([`ErasureTrainer`]):
            After `train()`, with a [`SpaceLoraConfig`]: the guarantee is kept in its certificate.
        risk (`float`, defaults to 0.01):
            Largest share of retained answers that may change. To show 1 % takes 299 images and texts.
        rows ([`~datasets.Dataset`] or `list[dict]`, *optional*):
            Rows in the formats of `retain_dataset`, none of which shares an image or a text with what the adapter was
            trained on; by default the retained rows that were held out.
        delta (`float`, defaults to 0.05):
            Probability of being wrong that is allowed.
        scales (`list[float]`, defaults to 0.1, 0.2, ..., 1):
            What is tried, from the weakest; nothing behind the first that fails.
        max_new_tokens (`int`, defaults to 24):
            Longest answer compared, in tokens.

    Returns:
        [`Calibration`]: What was chosen, and why.

    Raises:
        ValueError: If the rows are too few to show the risk, no scale can be shown to keep to it (the adapter stays as it
            was), or the trainer has no certificate of the adapter as it is.
    """
    check_risk(risk, delta)
    scales = tuple(scales)
    check_scales(scales)
    if trainer.certificate is None or trainer._measured_on != trainer._weights_now():
        raise ValueError(
            "there is no certificate of this adapter, in which the guarantee would be kept: call `trainer.train()` first, "
            "with a SpaceLoraConfig and a `certificate_share` that holds rows out."
        )
    if trainer.certificate.calibration is not None:
        raise ValueError(
            f"this adapter was calibrated already, for a risk of {trainer.certificate.calibration.risk:g}: choosing among "
            "scales a second time would not keep to the probability promised. Train again."
        )
    retained, chosen = trainer._unseen(rows)
    chosen = one_row_each(retained, chosen, trainer.args.seed, most=None)
    _check_number(len(chosen), risk, delta)  # Before anything is asked.
    model, names = trainer.accelerator.unwrap_model(trainer.model), [trainer.concept, *trainer.aliases]
    comparison = AnswerComparison(model, trainer.processing_class, retained, chosen, max_new_tokens, names)
    n, images = len(comparison.rows), comparison.images
    _check_number(n, risk, delta)

    def count_changed(scale: float) -> int:
        with _scaled(model, scale):
            # All processes ask the same; rank 0 decides where rounding made them differ.
            changed = processes.gather_objects(sum(comparison.changed()))[0]
        logger.info("Scale %g: %d of %d answers changed.", scale, changed, n)
        return changed

    tested, counts = try_scales(count_changed, scales, n, risk, delta)
    scale = choose(tested, counts, n, risk, delta)
    if scale is None:
        raise ValueError(
            f"at the smallest scale, {tested[0]:g}, the adapter changes {counts[0]} of {n} answers: a risk of "
            f"{risk:g} cannot be shown. Allow a higher one, pass more `rows`, or train under a stricter constraint. The "
            "adapter is left as it was."
        )
    _multiply(model, scale)
    result = Calibration(risk, delta, scale, images, n - images, tested, counts, comparison.left_out)
    held_out = trainer.held_out.dataset.indices
    used = rows is None or first_seen(retained, trainer.retained, held_out) is not None
    trainer._certify(end_to_end=not used)
    trainer._chosen_on_held_out = trainer._measured_on if used else None
    trainer.certificate = dataclasses.replace(trainer.certificate, calibration=result)
    return result


def _check_number(n: int, risk: float, delta: float) -> None:
    if n < (needed := items_needed(risk, delta)):
        raise ValueError(
            f"{n} distinct images and texts are held out; to show with probability {1 - delta:g} that at most {risk:g} of "
            f"the answers change takes {needed}, none of which changes. Pass more as `rows`, raise `certificate_share`, or "
            "allow a higher risk."
        )


@torch.no_grad()
def _multiply(model, scale: float) -> None:
    processes.reshard(model)
    for layer in adapted_layers(model, ADAPTER).values():
        lora_weights(layer, ADAPTER)[1].mul_(scale)


@contextmanager
def _scaled(model, scale: float) -> Iterator[None]:
    """The adapter as it would be saved with that scale, in its own precision; as it was afterwards, to the bit."""
    processes.reshard(model)
    weights = [lora_weights(layer, ADAPTER)[1] for layer in adapted_layers(model, ADAPTER).values()]
    before = [weight.detach().clone() for weight in weights]
    try:
        _multiply(model, scale)
        yield
    finally:
        processes.reshard(model)
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
