"""Adapter folders for the card's tests: small, complete, and the same every time."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from space_peft.evaluation import ErasureReport
from space_peft.null_space.certificate import LayerCertificate, RetentionCertificate
from space_peft.records.card_data import DatasetRecord, ErasureCardData
from space_peft.retained.end_to_end import EndToEnd
from space_peft.retained.held_out import HeldOut
from space_peft.statistics.calibration import Calibration


PROBES = {
    "forget": (0.95, 0.0, 40),
    "generality": (0.9, 0.025, 80),
    "free_form": (0.97, 0.0, 60),
    "forms": (0.1, 0.0, 160),
    "same_kind": (0.0, 0.8, 40),
    "retain": (1.0, 0.995, 400),
    "retain_sentences": (1.0, 0.99, 120),
    "retain_unseen_style": (1.0, 0.98, 250),
    "siblings": (1.0, 0.96, 50),
    "text": (0.997, 0.997, 360),
    "text_target": (1.0, 1.0, 6),
    "fluency": (1.0, 0.99, 300),
}


def card_data(text: str = "fox", **changes) -> ErasureCardData:
    """Card data in which every free text is `text`."""
    options = {
        "license": "apache-2.0",
        "language": "en",
        "reason": text,
        "not_tested": [text],
        "authors": [text],
        "contact": text,
        "paper": {"title": text, "id": "2606.09868"},
        "concept": text,
        "aliases": [text, text],
        "base_model": "org/base",
        "base_revision": "0123456789abcdef0123456789abcdef01234567",
        "datasets": [
            DatasetRecord("pool", name=text, id="org/pool", revision="89abcdef", split="train", rows=1000),
            DatasetRecord("retained", name=text, rows=720, license=text, fingerprint=text, split=text),
        ],
        "settings": {"SpaceConfig": {"max_steps": 60, "note": text}, text: {text: [text, None]}},
        "seed": 7,
        "steps": 24,
        "versions": {"python": "3.11.7", "torch": "2.13.0", text: text},
        "hardware": {"devices": {text: 1}, "processes": 1},
        "seconds": {"erase": 49.3, text: 180.0},
        "created": "2026-01-31",
    }
    return ErasureCardData(**{**options, **changes})


def report(text: str = "fox") -> ErasureReport:
    """A report on `text`, with a probe of that name beside the usual ones."""
    before = {key: {"value": value, "n": n} for key, (value, _, n) in PROBES.items()}
    after = {key: {"value": value, "n": n} for key, (_, value, n) in PROBES.items()}
    after["retain_unseen_style"]["accuracy"] = {"value": 0.86, "n": 306}
    before[text] = after[text] = {"value": 0.5, "n": 2}
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    return ErasureReport(text, before, after, seed=7, settings={"note": text}, versions=versions)


def attacks(text: str = "fox") -> dict:
    """Content of `attacks.json`."""
    entry = {"value": 0.25, "control": 0.2, "before": 0.95, "n": 12, "meaning": text, "details": {text: text}}
    found = {"relearning": entry, "quantization": {**entry, "control": None}}
    return {"concept": text, "attacks": found, "versions": {}}


def anchors(text: str = "fox") -> dict:
    """Content of `space_anchors.json`."""
    row = {"score": 0.3, "rank": 0, "pool_row": 3, "caption": text, "p_name_before": 0.002, "p_name_after": 0.9}
    return {
        "stage": "refined",
        "method": "text-guided",
        "concept": text,
        "aliases": [text],
        "description": text,
        "encoder": text,
        "templates": [text],
        "threshold": None,
        "excluded": {"undecodable": 0, "caption": 12, text: 1},
        "pool": {"fingerprint": text, "rows": 1000},
        "refinement": {
            "steps": 60,
            "seed": 7,
            text: 0.5,
            "questions": {"naming": [text], "kind": text, "open": [{"turns": [text], "system": text}]},
        },
        "anchors": [row, {**row, "score": 0.2, "p_name_after": 0.8}, {**row, "caption": None, "score": 0.25}],
    }


def certificate(text: str = "model.language_model.layers.{}.mlp.up_proj") -> RetentionCertificate:
    """Six layers, the first of which changes least."""
    layers = tuple(
        LayerCertificate(text.replace("{}", str(i)), 64, 16, 50.0, 0.9, 0.4, 0.5, 0.3, 0.1 * (i + 1), 0.001 * (i + 1))
        for i in range(6)
    )
    return RetentionCertificate(
        "soft", 0.3, 0.999, "token", {"image": 2048}, {"image": 256}, layers, HeldOut(720, 0.1, 7, 400),
        end_to_end=EndToEnd(30, 70, 2, 0.012, 0.0009, 24, 3),
        calibration=Calibration(0.05, 0.05, 0.8, 60, 140, (0.4, 0.8, 1.0), (0, 3, 9)),
    )  # fmt: skip


def write_folder(folder: Path, text: str = "fox", *, layer: str = "language_model.layers.0.mlp.up_proj") -> Path:
    """Writes a folder in which every text that comes from outside is `text`.

    Args:
        folder: Created.
        text: Concept, captions, names, reasons.
        layer: The adapted layer.
    """
    folder.mkdir(parents=True)
    contents = {
        "adapter_config.json": {"base_model_name_or_path": "org/base", "r": 12, "lora_alpha": 24},
        "space_config.json": {"constraint": "soft", "strength": 0.3, "statistics": text},
        "space_certificate.json": certificate().to_dict(),
        "space_anchors.json": anchors(text),
        "space_card.json": {"format": "space_peft.card_data.v1", **asdict(card_data(text))},
        "report.json": report(text).to_dict(),
        "attacks.json": attacks(text or "fox"),  # A report of attacks on nothing is refused.
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    key = f"base_model.model.model.{layer}.lora_{{}}.weight"
    save_file(
        {key.format("A"): torch.zeros(12, 8), key.format("B"): torch.zeros(4, 12)}, folder / "adapter_model.safetensors"
    )
    (folder / "pictures").mkdir()
    for name in ("answers", "probes", "anchors", "spectrum", "attacks"):
        Image.new("RGB", (2, 2)).save(folder / "pictures" / f"{name}.png")
    return folder
