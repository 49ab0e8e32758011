"""Provenance of an anchor dataset: what was asked of which pool, and what was left out and why.

It is kept as JSON in the `id` of the `score` column's feature. Unlike `dataset.info.description`, that survives
Parquet files and `push_to_hub` as well as `save_to_disk`, `select`, `map` and `add_column` (tested).
"""

from __future__ import annotations

import copy
import json

from datasets import Dataset, Value

from ..data.questions import QuestionSet
from ..data.rows import check_kind
from ..records.safe_json import parse_json


PROVENANCE_COLUMN = "score"
"""Beside an adapter: the provenance of the anchors it was trained on."""


def anchor_info(dataset: Dataset) -> dict:
    """Returns the provenance stored with an anchor dataset.

    Args:
        dataset (`datasets.Dataset`): From `select_anchors`, `select_random_anchors` or `refine_anchors`, reloaded or
            not.

    Returns:
        `dict`: A fresh copy; change it and store it with `set_anchor_info`.

    Raises:
        TypeError: If it is no `datasets.Dataset`.
        ValueError: If the dataset holds no provenance.
    """
    check_kind(dataset, "anchors")
    if not isinstance(dataset, Dataset):
        raise TypeError(f"expected anchors as a `datasets.Dataset`, got a {type(dataset).__name__}.")
    feature = dataset.features.get(PROVENANCE_COLUMN)
    text = getattr(feature, "id", None)
    try:
        info = parse_json(text.encode(), where="the provenance") if text else None
    except ValueError:
        info = None
    if not isinstance(info, dict) or "concept" not in info:
        raise ValueError(
            "the dataset holds no anchor provenance: expected it in the feature of a column "
            f"{PROVENANCE_COLUMN!r}, got "
            f"columns {dataset.column_names}. Make anchors with `select_anchors` (or `select_random_anchors`) and keep "
            f"the {PROVENANCE_COLUMN!r} column, or store provenance with `set_anchor_info`."
        )
    return info


def anchor_questions(anchors: Dataset) -> QuestionSet | None:
    """The questions that the anchors were refined with, held-out ones included.

    Args:
        anchors (`datasets.Dataset`): As [`anchor_info`] takes them.

    Returns:
        [`QuestionSet`]: Or `None`, if they were not refined, or by a version that kept a list of texts alone.

    Raises:
        ValueError: If the provenance holds questions that cannot be used, or there is none.
    """
    refinement = anchor_info(anchors).get("refinement")
    values = refinement.get("questions") if isinstance(refinement, dict) else None
    if not isinstance(values, dict):
        return None
    try:
        return QuestionSet.from_dict(values)
    except ValueError as error:
        raise ValueError(
            f"the questions in the anchors' provenance cannot be used: {error} Pass `questions`."
        ) from error


def set_anchor_info(dataset: Dataset, info: dict) -> Dataset:
    """Returns the dataset with `info` as its provenance; rows and `dataset` itself stay as they are.

    Args:
        dataset (`datasets.Dataset`): With a column `score`.
        info (`dict`): JSON-like content with at least the key `concept`.

    Raises:
        ValueError: If there is no `score` column, no `concept`, or the content is not JSON (NaN included).
    """
    if PROVENANCE_COLUMN not in dataset.column_names:
        raise ValueError(
            f"provenance is stored with a column {PROVENANCE_COLUMN!r}, got columns {dataset.column_names}."
        )
    if "concept" not in info:
        raise ValueError(f"expected provenance with the key 'concept', got keys {sorted(info)}.")
    # ASCII only: the text also goes into the YAML header of a Hub dataset card.
    text = json.dumps(info, ensure_ascii=True, allow_nan=False)
    details = copy.deepcopy(dataset.info)
    details.features[PROVENANCE_COLUMN] = Value(dataset.features[PROVENANCE_COLUMN].dtype, id=text)
    # Not `cast_column`: it would rewrite the table, images included, to change a note about one column.
    return Dataset(dataset.data, info=details, split=dataset.split, indices_table=dataset._indices)
