"""`push_statistics`: statistics of a base model to the Hub, so that whoever erases from it needs no retained data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError

from space_peft._version import __version__
from space_peft.null_space.base_statistics import Statistics, load_statistics
from space_peft.records.escape import code_span
from space_peft.records.folder import CARD_NAME
from space_peft.records.licenses import check_license
from space_peft.records.repository_ids import validate_repo_id

from .card import GENERATED
from .commit import commit_folder
from .manifest import write_manifest


_TAGS = ["space-peft", "machine-unlearning", "unlearning", "null-space", "statistics"]


def push_statistics(
    statistics: Statistics | str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    retries: int = 5,
) -> CommitInfo:
    """Publishes statistics of a base model with a card, in one commit; [`load_statistics`] gives them back.

    Args:
        statistics ([`Statistics`] or `str`): From [`collect_statistics`], or the folder they were saved to.
        repo_id (`str`): Model repository on the Hub; created if there is none.
        license (`str`, *optional*): Licence identifier of the Hub. They are derived from the base model and the data.
        private, revision, create_pr, commit_message, token, retries: See [`push_erasure`].

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        ValueError: If the base model has no id on the Hub, or the licence is unknown.
    """
    if not isinstance(statistics, Statistics):
        statistics = load_statistics(statistics)
    check_license(license)
    try:
        validate_repo_id(statistics.model or "")
    except HFValidationError as error:
        raise ValueError(
            f"the statistics are of the model {statistics.model!r}, which is not an id on the Hub, so nobody could tell what they "
            "are for; collect them from a model that was loaded by its id."
        ) from error
    with tempfile.TemporaryDirectory(prefix="space-peft-") as staged:
        folder = Path(staged, "statistics")
        statistics.save(folder)
        (folder / CARD_NAME).write_text(str(statistics_card(statistics, repo_id, license)), encoding="utf-8")
        write_manifest(folder)
        return commit_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload statistics with space-peft",
            token=token,
            retries=retries,
        )


def statistics_card(statistics: Statistics, repo_id: str, license: str | None = None) -> ModelCard:
    """The card of published statistics.

    Args:
        statistics ([`Statistics`]): What it is of.
        repo_id (`str`): Where they are going to be.
        license (`str`, *optional*): Licence identifier of the Hub.
    """
    data = ModelCardData(license=license, tags=_TAGS, base_model=statistics.model, library_name="space-peft")
    commit = f" at commit {code_span(statistics.commit)}" if statistics.commit else ""
    ranks = [moment.rank / moment.dim for moment in statistics.unique]
    body = f"""
{GENERATED} {__version__}. Rewritten at every push. -->

# What {code_span(statistics.model)} sees on retained data

Second moments of the inputs of {len(statistics)} linear layers of {code_span(statistics.model)}{commit}, over
{statistics.rows} retained rows. With them a concept is erased from the model without any retained row:

```python
from space_peft import SpaceTrainer

trainer = SpaceTrainer(model, args, anchors=anchors, statistics="{repo_id}", processing_class=processor)
```

- Kept of each layer: its leading eigenvectors ({min(ranks):.0%} to {max(ranks):.0%} of the dimensions) and one value for all
  others; {statistics.num_bytes / 2**20:.1f} MiB together.
- They hold for exactly these weights of the base model; others are refused.
- What they reveal: averages over all tokens of all rows, no row itself. Whether a certain image or text was among the rows
  can be guessed somewhat better than by chance where rows are few; see "Statistics" in the documentation.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
