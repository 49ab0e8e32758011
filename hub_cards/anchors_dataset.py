"""`push_anchors`: an anchor dataset to the Hub, by default ids and scores, without an image."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData

from space_peft._version import __version__
from space_peft.anchors import anchor_info, set_anchor_info
from space_peft.data.names import check_target, mentions
from space_peft.records.card_data import ErasureCardData
from space_peft.records.escape import code_span, markdown_text
from space_peft.records.folder import CARD_NAME
from space_peft.records.licenses import check_license

from .card import GENERATED
from .commit import commit_folder
from .local_traces import Finding, local_trace, texts
from .manifest import write_manifest
from .redaction import redact_anchors, redacted_label, redaction_salt, without_name


logger = logging.getLogger(__name__)

LICENSE_COLUMN = "license"
_DATA = "data/train-00000-of-00001.parquet"
_TAGS = ["space-peft", "machine-unlearning", "unlearning", "anchors"]
_MOST_SHOWN = 10


def push_anchors(
    anchors: Dataset,
    repo_id: str,
    *,
    include_images: bool = False,
    license: str | None = None,
    redact: bool = False,
    redaction_folder: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    retries: int = 5,
) -> CommitInfo:
    """Publishes anchors as a dataset with a card, in one commit: which rows of which pool stood in for the concept.

    `load_dataset` gives them back with their provenance (`anchor_info`). Without images they say where the images are:
    by `pool_row` and `pool_id` in the pool that the provenance names.

    Args:
        anchors (`datasets.Dataset`): From `select_anchors` or `refine_anchors`. Stays as it is.
        repo_id (`str`): Dataset repository on the Hub; created if there is none.
        include_images (`bool`, defaults to `False`): Publish the images, refined and raw, too. They are somebody's
            work: only with a licence for each of them.
        license (`str`, *optional*): Licence identifier of the Hub, of all images; or a column `license` of `anchors` says
            it of each.
        redact (`bool`, defaults to `False`): Publish a salted hash instead of the concept's name; leaves captions, rows
            of the pool and images out, for they tell what the concept is.
        redaction_folder (`str` or `pathlib.Path`, *optional*): The adapter's folder, whose salt is used.
        private, revision, create_pr, commit_message, token, retries: See [`push_erasure`].

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        ValueError: If `anchors` hold no provenance, images are asked for that have no licence, a text or the provenance
            holds a local path or a token, or something names a concept that is to be redacted.
    """
    info = anchor_info(anchors)
    images = [name for name, feature in anchors.features.items() if isinstance(feature, Image)]
    if include_images and redact:
        raise ValueError(
            "`include_images` and `redact` cannot be used together: the images show what is not to be named."
        )
    if include_images:
        license, extra = _image_licenses(anchors, license)
    else:
        check_license(license)
        anchors, extra = anchors.remove_columns(images), {}
    if redact:
        anchors, info = _redacted(anchors, info, redaction_folder, [repo_id, commit_message, revision])
    anchors = set_anchor_info(anchors, info)
    _refuse_local(anchors, info)
    with tempfile.TemporaryDirectory(prefix="space-peft-") as staged:
        path = Path(staged, _DATA)
        path.parent.mkdir()
        anchors.to_parquet(path)
        card = _card(anchors, info, repo_id, license, extra, images=images if include_images else [])
        Path(staged, CARD_NAME).write_text(str(card), encoding="utf-8")
        write_manifest(staged)
        return commit_folder(
            staged,
            repo_id,
            repo_type="dataset",
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload anchors with space-peft",
            token=token,
            retries=retries,
        )


def _image_licenses(anchors: Dataset, license: str | None) -> tuple[str | None, dict[str, int]]:
    """The licence for the card's header, and how many images have which if there are several."""
    if license is not None:
        check_license(license)
        return license, {}
    if LICENSE_COLUMN not in anchors.column_names:
        raise ValueError(
            "images are published under a licence only: pass `license=` if one holds for all of them, or add a column "
            f"{LICENSE_COLUMN!r} that says it of each. Or leave `include_images` out: ids and scores need none."
        )
    values = anchors[LICENSE_COLUMN]
    missing = [i for i, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(anchors)} anchors have no licence in the column {LICENSE_COLUMN!r} (row {missing[0]} "
            "is the first); remove those rows, or find out their licence."
        )
    counts = dict(Counter(values))
    if len(counts) > 1:
        return None, counts
    check_license(values[0])
    return values[0], {}


def _redacted(
    anchors: Dataset, info: dict, folder: str | Path | None, announced: Sequence[str | None]
) -> tuple[Dataset, dict]:
    if folder is None:
        raise ValueError(
            "pass the adapter's folder as `redaction_folder`: its salt makes the same hash as the adapter's."
        )
    concept, aliases = check_target(info["concept"], info.get("aliases"))
    names = [concept, *aliases]
    for text in filter(None, announced):
        if mentions(text, names):
            raise ValueError(f"{text!r} mentions the concept whose name is to be redacted; choose another text.")
    label = redacted_label(without_name(ErasureCardData(concept=names[0]), names, redaction_salt(folder)))
    rows = [{key: value for key, value in row.items() if not isinstance(value, str)} for row in anchors]
    redacted = redact_anchors({**info, "anchors": rows}, names, label)
    kept = [name for name in anchors.column_names if redacted["anchors"] and name in redacted["anchors"][0]]
    del redacted["anchors"]
    return anchors.select_columns(kept), redacted


def _refuse_local(anchors: Dataset, info: dict) -> None:
    content = {"provenance": info, "rows": anchors.select_columns(_text_columns(anchors)).to_list()}
    for where, text, _ in texts(content):
        if what := local_trace(text):
            raise ValueError(f"not published, because of {Finding('anchors', where, what)}. Remove it, and push again.")


def _text_columns(anchors: Dataset) -> list[str]:
    return [name for name, feature in anchors.features.items() if getattr(feature, "dtype", None) == "string"]


def _card(
    anchors: Dataset, info: dict, repo_id: str, license: str | None, licenses: dict[str, int], *, images: list[str]
) -> DatasetCard:
    pool = info.get("pool") or {}
    data = DatasetCardData(
        license=license,
        tags=_TAGS,
        source_datasets=[pool["id"]] if pool.get("id") else None,
        size_categories="n<1K" if len(anchors) < 1000 else "1K<n<10K",
        # Column types and provenance are read from the Parquet file itself.
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    concept = markdown_text(info["concept"])
    origin = f"the pool {code_span(pool['id'])}" if pool.get("id") else "a pool of public images"
    if pool.get("revision"):
        origin += f" at revision {code_span(pool['revision'])}"
    facts = [
        f"Stage: {markdown_text(str(info.get('stage', 'selected')))}",
        f"Selection: {markdown_text(str(info.get('method')))}, by {markdown_text(str(info.get('encoder')))}",
        f"Pool: {pool.get('rows', 'an unknown number of')} images",
    ]
    excluded = {key: n for key, n in (info.get("excluded") or {}).items() if n}
    if excluded:
        facts.append("Left out: " + ", ".join(f"{n} ({markdown_text(key)})" for key, n in excluded.items()))
    if licenses:
        facts.append("Licences: " + ", ".join(f"{markdown_text(key)} ({n})" for key, n in sorted(licenses.items())))
    columns = [name for name in anchors.column_names if name not in images]
    head = [f"| {' | '.join(map(markdown_text, columns))} |", "|" + "---|" * len(columns)]
    shown = anchors.select(range(min(_MOST_SHOWN, len(anchors)))).select_columns(columns)
    table = head + [f"| {' | '.join(markdown_text(_cell(row[name])) for name in columns)} |" for row in shown]
    images_line = (
        f"The images are in {', '.join(code_span(name) for name in images)}."
        if images
        else "No images are published: `pool_row` and `pool_id`, where given, say which row of the pool each one is."
    )
    body = f"""
{GENERATED} {__version__}. Rewritten at every push. -->

# Anchors for the erasure of: {concept}

{len(anchors)} images of {origin} that stood in for the concept while a model was made to forget it with space-peft: nobody
needed a picture of the concept itself. {images_line}

{chr(10).join(f"- {fact}" for fact in facts)}

```python
from datasets import load_dataset
from space_peft.anchors import anchor_info

anchors = load_dataset("{repo_id}", split="train")
anchor_info(anchors)  # how they were made
```

{chr(10).join(table)}
"""
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
