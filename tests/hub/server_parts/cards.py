"""The Hub's checks of README.md's metadata (docs: "Model Cards", "Dataset Cards"): those a card of ours can break."""

from __future__ import annotations

import re

import yaml


HEADER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_metadata(content: str) -> dict | None:
    """The YAML header; `None` if there is none or it cannot be read."""
    match = HEADER.match(content)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    return data if isinstance(data, dict) else None


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors, which keep a README.md out of a repository, and warnings, which are shown to who pushes it."""
    match = HEADER.match(content)
    if not match or not match[1].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not isinstance(data, dict):
        return ["YAML Metadata Error: expected a mapping"], []
    errors = [f'"{key}" must be a string' for key in ("pipeline_tag", "library_name") if _is_other(data, key, str)]
    for key in ("tags", "datasets", "metrics"):
        values = data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be an array of strings')
    for key in ("language", "license", "base_model"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{key}" must be a string or an array of strings')
    for name in _strings(data.get("base_model")):
        if not REPO_ID.fullmatch(name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    for name in _strings(data.get("datasets")):
        if not REPO_ID.fullmatch(name):
            errors.append(f'"datasets" with value "{name}" is not valid. Use a dataset id from https://hf.co/datasets.')
    for code in _strings(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", code):
            errors.append(f'"language" must only contain lowercase ISO 639 codes, got "{code}"')
    return errors + _check_model_index(data.get("model-index", [])), []


def _is_other(data: dict, key: str, kind: type) -> bool:
    return key in data and not isinstance(data[key], kind)


def _strings(value) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _check_model_index(index) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, entry in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        for j, result in enumerate(entry.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            for key, needed in (("task", ("type",)), ("dataset", ("name", "type"))):
                part = result.get(key) if isinstance(result.get(key), dict) else {}
                errors += [f'"{where}.{key}.{name}" is required' for name in needed if not part.get(name)]
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{where}.metrics" is required')
                continue
            for k, metric in enumerate(metrics):
                errors += [
                    f'"{where}.metrics[{k}].{name}" is required'
                    for name in ("type", "value")
                    if metric.get(name) is None
                ]
    return errors
