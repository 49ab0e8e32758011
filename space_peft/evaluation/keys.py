"""The keys of a report, in the order in which they are shown: what each one means, everywhere it is shown.

A new probe is an entry here and its rows in `probes.build_probes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


# An erasure of which more of the target's pictures are named than this is not called one.
FORGOTTEN = 0.05


@dataclass(frozen=True)
class ReportKey:
    """
    A score of an evaluation.

    Args:
        name (`str`): Key in `report.json`.
        label (`str`): For the rows of tables.
        better (`str`): Which way it should go.
        bar (`str`): For the picture of all scores.
        meaning (`str`): What it is a share of, to somebody who has not read the paper.
        kept (`bool`, defaults to `False`): Whether it is a share of what the original model knew: 1 before an erasure by
            definition, which is no measurement.
        cost (`str`, *optional*): What it says of the price of an erasure, in the first table of a card.
    """

    name: str
    label: str
    better: Literal["lower", "higher"]
    bar: str
    meaning: str
    kept: bool = False
    cost: str | None = None


KEYS = {
    key.name: key
    for key in (
        ReportKey(
            "forget",
            "target still named",
            "lower",
            "target named",
            "images of the concept, never used in training, on which it is still named",
        ),
        ReportKey(
            "generality",
            "target named or confirmed, other questions",
            "lower",
            "target named or confirmed,\nother questions",
            "the same under questions never trained on, and yes/no questions answered yes",
        ),
        ReportKey(
            "free_form",
            "target named in sentences",
            "lower",
            "target named in sentences",
            "the same in sentences: descriptions, captions, a story, a second turn, a system prompt",
        ),
        ReportKey(
            "forms",
            "target named in another form",
            "lower",
            "target named in another form",
            "answers to all of these that name it in another form: plural, capitals, another spelling",
        ),
        ReportKey(
            "same_kind",
            "target called something of its kind",
            "higher",
            "called something of its kind",
            "images of the concept called by a broader word or as another thing of its kind",
        ),
        ReportKey(
            "retain",
            "others kept, trained styles",
            "higher",
            "kept: trained styles",
            "images of other concepts still answered as before",
            kept=True,
            cost="other images",
        ),
        ReportKey(
            "retain_sentences",
            "others named in sentences",
            "higher",
            "kept: named in sentences",
            "images of other concepts still named in sentences",
            kept=True,
            cost="other images in sentences",
        ),
        ReportKey(
            "retain_unseen_style",
            "others kept, unseen style",
            "higher",
            "kept: unseen style",
            "the same in a style the erasure was not trained on",
            kept=True,
            cost="an unseen style",
        ),
        ReportKey(
            "siblings",
            "same kind kept",
            "higher",
            "kept: same kind",
            "images of the same kind as the concept still answered as before",
            kept=True,
            cost="images of the same kind",
        ),
        ReportKey(
            "text",
            "text-only, other concepts",
            "higher",
            "text-only: others",
            "text-only questions about other concepts answered",
            cost="text-only questions",
        ),
        ReportKey(
            "text_target",
            "text-only, the target",
            "higher",
            "text-only: target",
            "text-only questions about the concept answered: kept on purpose",
        ),
        ReportKey(
            "fluency",
            "sensible answers",
            "higher",
            "sensible answers",
            "answers that are a sensible name or a refusal, not garbage",
        ),
    )
}
REPORT_KEYS = tuple(KEYS)
"""Names of the scores of a report, in the order in which they are shown."""
