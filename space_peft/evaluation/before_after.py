"""What an erasure did: the same probes with the erasure and without it."""

from __future__ import annotations

from collections.abc import Sequence

from ..modeling.layers import deployed_model
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
