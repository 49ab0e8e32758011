"""The Hub's documented schema of model card metadata, as a check that needs no network.

Sources: https://github.com/huggingface/hub-docs/blob/main/modelcard.md (fields, `model-index`),
https://huggingface.co/docs/hub/model-cards (`base_model_relation`, `pipeline_tag`),
https://huggingface.co/docs/hub/repositories-licenses (licence identifiers, in `space_peft.records.licenses`),
`huggingface_hub.ModelCardData` (types).
"""

import re

from huggingface_hub.utils import validate_repo_id

from space_peft.records.licenses import LICENSES


RELATIONS = {"adapter", "finetune", "merge", "quantized"}
TASKS = {"image-text-to-text", "image-to-text", "visual-question-answering", "text-generation"}
TEXT, TEXTS, NUMBER, OPTIONS = "text", "texts", "number", "options"
FIELDS = {
    "base_model": TEXT, "base_model_relation": TEXT, "library_name": TEXT, "pipeline_tag": TEXT, "license": TEXT,
    "license_name": TEXT, "license_link": TEXT, "language": TEXTS, "tags": TEXTS, "datasets": TEXTS, "metrics": TEXTS,
    "model-index": "model-index",
}  # fmt: skip
# Key -> (type, whether it must be there).
TASK = {"type": (TEXT, True), "name": (TEXT, False)}
DATASET = {
    "type": (TEXT, True), "name": (TEXT, True), "config": (TEXT, False), "split": (TEXT, False),
    "revision": (TEXT, False), "args": (OPTIONS, False),
}  # fmt: skip
METRIC = {
    "type": (TEXT, True), "value": (NUMBER, True), "name": (TEXT, False), "config": (TEXT, False),
    "args": (OPTIONS, False), "verified": (OPTIONS, False),
}  # fmt: skip
SOURCE = {"url": (TEXT, True), "name": (TEXT, False)}


def check_metadata(data: dict) -> None:
    """Raises `AssertionError` that names the field which the Hub would refuse or ignore."""
    for key, value in data.items():
        assert key in FIELDS, f"{key} is no documented field"
        kind = FIELDS[key]
        if kind == TEXTS and isinstance(value, str) and key == "language":
            value = [value]
        if kind != "model-index":
            _check_type(value, kind, key)
    validate_repo_id(data["base_model"])
    assert data["base_model_relation"] in RELATIONS
    assert data["pipeline_tag"] in TASKS
    assert re.fullmatch(r"[a-z0-9_.-]+", data["library_name"])
    license = data.get("license")
    assert license is None or license in LICENSES
    assert (license == "other") == ("license_name" in data) == ("license_link" in data)
    for code in [data["language"]] if isinstance(data.get("language"), str) else data.get("language", []):
        assert re.fullmatch(r"[a-z]{2,3}|multilingual|code", code), code
    for dataset in data.get("datasets", []):
        validate_repo_id(dataset)
    assert len(set(data.get("tags", []))) == len(data.get("tags", []))
    if "model-index" in data:
        _check_model_index(data["model-index"])


def _check_model_index(index: list) -> None:
    assert isinstance(index, list) and len(index) == 1
    (model,) = index
    assert set(model) == {"name", "results"}
    _check_type(model["name"], TEXT, "model-index name")
    seen = set()
    for result in model["results"]:
        assert {"task", "dataset", "metrics"} <= set(result) <= {"task", "dataset", "metrics", "source"}
        _check_entry(result["task"], TASK, "task")
        _check_entry(result["dataset"], DATASET, "dataset")
        assert result["task"]["type"] in TASKS
        # "fails to match the required pattern", says the Hub of anything else.
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result["dataset"]["type"])
        identity = tuple(result["dataset"].get(key) for key in ("type", "config", "split", "revision"))
        assert identity not in seen, f"two results for {identity}"
        seen.add(identity)
        assert result["metrics"]
        for metric in result["metrics"]:
            _check_entry(metric, METRIC, "metric")
        if "source" in result:
            _check_entry(result["source"], SOURCE, "source")


def _check_entry(entry: dict, schema: dict, where: str) -> None:
    assert isinstance(entry, dict), where
    assert set(entry) <= set(schema), f"{where}: unknown {set(entry) - set(schema)}"
    for key, (kind, required) in schema.items():
        assert key in entry or not required, f"{where} lacks {key}"
        if key in entry:
            _check_type(entry[key], kind, f"{where}.{key}")


def _check_type(value, kind: str, where: str) -> None:
    if kind == TEXT:
        assert isinstance(value, str) and value, where
    elif kind == TEXTS:
        assert isinstance(value, list) and value and all(isinstance(item, str) and item for item in value), where
    elif kind == NUMBER:
        assert isinstance(value, (int, float)) and not isinstance(value, bool), where
