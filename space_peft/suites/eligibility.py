"""What a model knew before: who counts at all, by VLM-UnBench's rule.

A concept that the untouched model does not recognise cannot be forgotten, and one that it answers without looking says nothing
about its pictures. This asks the classification questions with a picture as they are, without one, with somebody else's, and
with the options alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .extras import require_all
from .runner import Item, items_of, rows_of
from .schema import IMAGE_TEXT, Protocol, Subject, Suite


# The thresholds of the benchmark: share of right choices, and lead over the best of the three controls.
KNOWN, LEAD = 0.60, 0.20
CONDITIONS = ("as asked", "no image", "other image", "options only")


@dataclass(frozen=True)
class Eligibility:
    """Whether a subject counts, and why.

    Args:
        shares (`dict[str, float]`): Share of right choices under each of `CONDITIONS`.
        questions (`int`): How many were asked under each.
        eligible (`bool`): At least `KNOWN` as asked, and at least `LEAD` above the best of the others.
    """

    shares: Mapping[str, float]
    questions: int
    eligible: bool


def subject_eligibility(
    model, processor, suite: Suite, split: str, *, batch_size: int = 16, seed: int = 0, progress: bool = True
) -> dict[str, Eligibility | None]:
    """Which subjects of a split the untouched model knows by their pictures.

    `suite.only([id for id, found in eligibility.items() if found and found.eligible], split)` is the suite of those.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model before anything was unlearned.
        processor (`ProcessorMixin`): Its processor.
        suite ([`Suite`]): With classification questions about pictures, of at least two subjects.
        split (`str`): Which of its splits.
        batch_size (`int`, defaults to 16): Questions a forward pass.
        seed (`int`, defaults to 0): Of which picture is shown, and of whose instead.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        `dict[str, Eligibility]`: By subject's id; None for one without such questions, about whom nothing is known.

    Raises:
        ValueError: If no subject has such questions, or only one has a picture.
    """
    require_all()
    subjects = suite.split(split)
    items = [
        item
        for item in items_of(subjects, suite.protocol, seed)
        if item.question.kind == "classification" and item.question.modality == IMAGE_TEXT
    ]
    if not items:
        raise ValueError(
            f"no subject in {split!r} of the suite {suite.name!r} has a classification question about a picture, so it "
            "cannot be told who is known by it."
        )
    right: dict[str, dict[str, list[bool]]] = {}
    for condition in CONDITIONS:
        shown = _changed(items, subjects, condition, suite.protocol, seed)
        rows = rows_of(model, processor, shown, suite.protocol, batch_size=batch_size, progress=progress)
        for row in rows:
            right.setdefault(row["subject"], {}).setdefault(condition, []).append(row["accuracy"])
    found: dict[str, Eligibility | None] = dict.fromkeys(subject.id for subject in subjects)
    for id, by_condition in right.items():
        shares = {condition: sum(hits) / len(hits) for condition, hits in by_condition.items()}
        lead = shares[CONDITIONS[0]] - max(shares[condition] for condition in CONDITIONS[1:])
        # Shares are of whole questions: 0.8 - 0.6 must not miss 0.2 by rounding.
        eligible = shares[CONDITIONS[0]] >= KNOWN and lead >= LEAD - 1e-9
        found[id] = Eligibility(shares, len(by_condition[CONDITIONS[0]]), eligible)
    return found


def _changed(
    items: Sequence[Item], subjects: Sequence[Subject], condition: str, protocol: Protocol, seed: int
) -> list[Item]:
    if condition == "as asked":
        return list(items)
    if condition == "other image":
        pictured = [subject for subject in subjects if subject.images]
        if len(pictured) < 2:
            raise ValueError(
                "only one subject has a picture; expected two, to show the one's where the other is asked about."
            )
        # Everybody gets the pictures of the next one around, by a step that the seed chooses: never their own.
        step = 1 + seed % (len(pictured) - 1)
        donors = {s.id: pictured[(i + step) % len(pictured)] for i, s in enumerate(pictured)}
        return [
            replace(item, prompt=replace(item.prompt, image=donor.images[(item.picture or 0) % len(donor.images)]))
            for item in items
            for donor in [donors[item.subject]]
        ]
    changed = []
    for item in items:
        text = item.prompt.text
        if condition == "options only":
            text = protocol.prompt(item.question, "Choose one.")
        changed.append(replace(item, prompt=replace(item.prompt, text=text, image=None)))
    return changed
