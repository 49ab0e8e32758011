"""What an erasure did: the same probes with the erasure and without it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..distributed import processes
from ..modeling.layers import deployed_model
from .keys import FORGOTTEN
from .probes import Probe, ProbeResults, evaluate_probes
from .sentence_fluency import judge_sentences


def evaluate_erasure(
    model, processor, probes: Sequence[Probe], *, original=None, baseline: ProbeResults | None = None, **options
) -> tuple[ProbeResults, ProbeResults]:
    """Asks the original model and the erased one the same, and has the original judge the sentences of both.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model.
        processor (`ProcessorMixin`): Its processor.
        probes (`list[Probe]`): What is asked.
        original (`PreTrainedModel`, *optional*): The model before the erasure, where it is not `model` without its adapter.
        baseline ([`ProbeResults`], *optional*): The first of what an earlier call returned for the same probes.
        options: See [`evaluate_probes`].

    Returns:
        `tuple[ProbeResults, ProbeResults]`: Before and after.
    """
    if original is not None:
        known = baseline or judge_sentences(
            evaluate_probes(original, processor, probes, **options), probes, original, processor
        )
        after = evaluate_probes(model, processor, probes, baseline=known, **options)
        return known, judge_sentences(after, probes, original, processor)
    if baseline is None:
        with deployed_model(model) as deployed:
            baseline = evaluate_probes(model, processor, probes, **options)
            baseline = judge_sentences(baseline, probes, deployed, processor)
    after = evaluate_probes(model, processor, probes, baseline=baseline, **options)
    with deployed_model(model) as deployed:
        return baseline, judge_sentences(after, probes, deployed, processor)


def warn_if_not_named(model, processor, concept: str, probes: Sequence[Probe], *, progress: bool = True) -> None:
    """Asks the deployed model about pictures of the concept, and warns if it names it on next to none: nothing is to be forgotten.

    In a distributed run rank 0 asks.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model before the erasure.
        processor (`ProcessorMixin`): Its processor.
        concept (`str`): The name.
        probes (`list[Probe]`): Of them those named "forget" are asked; nothing without any.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.
    """
    own = [probe for probe in probes if probe.name == "forget" and len(probe.rows)]
    if not own:
        return

    def ask(asked: list[Probe]) -> tuple[int, int]:
        with deployed_model(model) as deployed:
            records = evaluate_probes(deployed, processor, asked, progress=progress).records
        return sum(record["hit"] for record in records), len(records)

    named, count = processes.divide([own], ask)[0]
    if named <= FORGOTTEN * count:
        warnings.warn(
            f"{concept!r} was named on {named} of {count} of your test pictures. The model may not know it by this name; then "
            "there is nothing to forget, and the pictures can show nothing. Ask it what it calls them, and give that name "
            "(or `aliases`).",
            stacklevel=3,
        )
