"""The YAML header of a model card: what the Hub filters, links and displays."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HTTPError

from space_peft.evaluation.keys import KEYS
from space_peft.records.escape import plain_line

from .facts import ErasureFacts


TAGS = ("space-peft", "unlearning", "machine-unlearning", "concept-erasure", "null-space", "lora")
TASK = "image-text-to-text"
# The Hub wants an id made of word characters, dots and dashes; no dataset of this name exists.
PROBES = "space-peft-probes"
_TIMEOUT = 10.0


@dataclass(frozen=True)
class License:
    """A licence and where it comes from.

    Args:
        id (`str`, *optional*): Identifier of the Hub; `None` if none is known.
        name (`str`, *optional*): With id "other".
        link (`str`, *optional*): With id "other".
        inherited (`bool`): Whether it is the base model's.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    inherited: bool = False


def find_license(facts: ErasureFacts, token: str | bool | None = None) -> License:
    """The adapter's licence: the one given, else the base model's as recorded or as its card states it.

    Args:
        facts ([`ErasureFacts`]): From `read_facts`.
        token (`str` or `bool`, *optional*): For a base model that is gated.
    """
    data = facts.data
    if data.license:
        return License(data.license, data.license_name, data.license_link)
    if data.base_license and data.base_license != "other":
        return License(data.base_license, inherited=True)
    if facts.base_model is None:
        return License()
    try:
        card = HfApi().model_info(facts.base_model, timeout=_TIMEOUT, token=token).card_data
    except (HTTPError, OSError):
        # Offline, private, or not there: the card says that the licence is unknown.
        return License()
    id, name, link = (card.get(key) if card else None for key in ("license", "license_name", "license_link"))
    if not isinstance(id, str):
        return License()
    if link and "://" not in link:
        link = f"https://huggingface.co/{facts.base_model}/blob/main/{link}"
    return License(id, name, link, inherited=True)


def card_metadata(facts: ErasureFacts, license: License) -> ModelCardData:
    """The card's metadata, with one `model-index` result per probe and attack, before and after.

    Args:
        facts ([`ErasureFacts`]): From `read_facts`.
        license ([`License`]): From `find_license`.
    """
    results = _results(facts)
    return ModelCardData(
        base_model=facts.base_model,
        base_model_relation=None if facts.base_model is None else "adapter",
        library_name="peft",
        pipeline_tag=TASK,
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        language=facts.data.language,
        datasets=list(dict.fromkeys(record.id for record in facts.data.datasets if record.id)) or None,
        tags=[*_base_tags(facts), *TAGS, *map(plain_line, facts.data.tags)],
        model_name=model_name(facts) if results else None,
        eval_results=results or None,
    )


def _base_tags(facts: ErasureFacts) -> list[str]:
    """PEFT's own tag of an adapter; the Hub derives the same from `base_model`."""
    return [] if facts.base_model is None else [f"base_model:adapter:{facts.base_model}"]


def model_name(facts: ErasureFacts) -> str:
    """A title: one line of plain text."""
    base = "A local model" if facts.base_model is None else facts.base_model.rsplit("/", 1)[-1]
    return f"{base} without {'a concept' if facts.redacted else plain_line(facts.concept)}"


def _results(facts: ErasureFacts) -> list[EvalResult]:
    # Results of one (task, dataset, config, split) become one entry: `config` keeps the probes apart.
    measured = []
    if facts.report is not None:
        for key, after in facts.report.after.items():
            better = f", {KEYS[key].better} is better" if key in KEYS else ""
            before = facts.report.before.get(key, {}).get("value")
            probe = plain_line(key) or "unnamed"
            measured.append((probe, f"erasure probe: {probe}{better}", before, after["value"]))
    for name, attack in facts.attacks.items():
        measured.append((f"attack-{name}", f"attack: {name}, lower is better", attack["before"], attack["value"]))
    results = []
    for config, title, before, after in measured:
        for value, when in ((after, "after erasure"), (before, "before erasure")):
            if value is None or after is None:
                continue
            results.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=PROBES,
                    dataset_name=title,
                    dataset_config=config,
                    metric_type=config,
                    metric_name=f"{config} ({when})",
                    metric_value=round(float(value), 4),
                )
            )
    return results
