"""A model card that says what was erased, how well, at what cost, and how to use and to undo it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from space_peft._io import atomic_path


TAGS = ["space-peft", "unlearning", "machine-unlearning", "null-space", "lora"]

# Report key -> what it says to someone who has not read the paper.
MEANING = {
    "forget": "images of the concept still named (lower is better)",
    "generality": "the same under questions never trained on, yes/no included (lower is better)",
    "retain": "other images still answered as before",
    "retain_unseen_style": "the same in a drawing style never trained on",
    "siblings": "images of the same kind still answered as before",
    "text": "text-only questions about other concepts answered",
    "text_target": "text-only questions about the concept answered",
    "fluency": "answers that are a valid name or kind, or a refusal",
}

BODY = """
# {title}

This LoRA adapter makes [{base}](https://huggingface.co/{base}) stop naming **{concept}** in images. It was made with
[space-peft](https://arxiv.org/abs/2606.09868) **without a single picture of the concept**: public stand-ins were
selected by the name alone, refined until the model itself called them by it, and trained on with every update
confined to the null space of retained knowledge.

## Results

{results}

## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "this/repository")
model = model.merge_and_unload()  # an adapter can be switched off: merge before you release
```

## What keeps the rest

{certificate}

## Where the anchors came from

{anchors}

## Limits

- **Reversible unless merged.** Switching the adapter off restores the concept.
- **Tested only as listed above.** Fine-tuning on pictures of the concept, quantisation and adversarial images were not
  tested.
- The concept is still known *in words*: text-only questions about it are answered, by design.
"""


def _read(folder: Path, name: str) -> dict | None:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _plain(text: str) -> str:
    """A name that cannot break out of the card: one line, no Markdown or HTML of its own."""
    text = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#|!" else {"<": "&lt;", ">": "&gt;"}.get(c, c) for c in text)


def _results(report: dict | None) -> str:
    if report is None:
        return "No evaluation is stored with this adapter."
    rows = ["| probe | before | after | n | meaning |", "|---|---|---|---|---|"]
    for key, meaning in MEANING.items():
        before, after = report["before"].get(key), report["after"].get(key)
        if before and after and after["value"] is not None:
            rows.append(f"| {key} | {before['value']:.3f} | {after['value']:.3f} | {after['n']} | {meaning} |")
    return "\n".join(rows)


def _anchors(provenance: dict | None) -> str:
    if provenance is None:
        return "No provenance is stored with this adapter."
    n = len(provenance["anchors"])
    before = [a["p_name_before"] for a in provenance["anchors"] if a.get("p_name_before") is not None]
    after = [a["p_name_after"] for a in provenance["anchors"] if a.get("p_name_after") is not None]
    text = f"{n} images of a public pool, listed by row in `space_anchors.json`."
    if before and after:
        text += (
            f" The model's mean probability of the name for them was {sum(before) / n:.3f} before refinement and "
            f"{sum(after) / n:.3f} after it."
        )
    return text


def _certificate(settings: dict | None, certificate: dict | None) -> str:
    if settings is None:
        return "The adapter was trained without a null-space constraint."
    knob = "energy" if settings["constraint"] == "hard" else "strength"
    text = f"Constraint: `{settings['constraint']}` ({knob} {settings[knob]})."
    if certificate is not None:
        text += (
            " Per layer, the bound and the change measured on held-out retained data are in `space_certificate.json`."
        )
    return text


def erasure_card(folder: str | os.PathLike, *, base_model: str | None = None, license: str | None = None) -> ModelCard:
    """Builds the card of an adapter from what `SpaceTrainer` and the evaluation saved beside it.

    Args:
        folder (`str` or `os.PathLike`): The adapter folder; `space_anchors.json`, `space_config.json`,
            `space_certificate.json` and `report.json` are used where they exist.
        base_model (`str`, *optional*): Hub id of the base model; by default the one in `adapter_config.json`.
        license (`str`, *optional*): Licence identifier, by default none is stated.

    Returns:
        [`~huggingface_hub.ModelCard`]: With metadata and one model-index result per probe.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If the base model is a local path: a card must not publish one.
    """
    folder = Path(folder)
    adapter = _read(folder, "adapter_config.json")
    if adapter is None:
        raise FileNotFoundError(f"{folder} holds no adapter_config.json; save the adapter there first.")
    base = base_model or adapter.get("base_model_name_or_path") or ""
    if not base or Path(base).is_absolute() or Path(base).exists():
        raise ValueError(f"the adapter's base model is the local path {base!r}; pass its Hub id as `base_model`.")
    report, provenance = _read(folder, "report.json"), _read(folder, "space_anchors.json")
    concept = (provenance or {}).get("concept") or (report or {}).get("concept") or "a concept"
    results = []
    for key in MEANING if report else ():
        value = report["after"].get(key, {}).get("value")
        if value is not None:
            results.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type="probes",
                    dataset_name="space-peft erasure probes",
                    metric_type=key,
                    metric_value=round(value, 4),
                    metric_name=key,
                )
            )
    name = f"{base.rsplit('/', 1)[-1]} without {concept}"
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        license=license,
        tags=["base_model:adapter:" + base, *TAGS],
        model_name=name if results else None,
        eval_results=results or None,
    )
    body = BODY.format(
        title=_plain(name),
        base=base,
        concept=_plain(concept),
        results=_results(report),
        certificate=_certificate(_read(folder, "space_config.json"), _read(folder, "space_certificate.json")),
        anchors=_anchors(provenance),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def write_card(folder: str | os.PathLike, **kwargs) -> Path:
    """Writes `erasure_card(folder, **kwargs)` to the folder's README.md and returns its path."""
    path = Path(folder) / "README.md"
    card = erasure_card(folder, **kwargs)
    with atomic_path(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return path
