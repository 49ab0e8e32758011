"""Train the embedded model from the rendered drawings.

    python examples/demo_model/train.py --work work

Three stages (`warm_start.py`, `language.py`, `sentences.py`), counted in steps with fixed seeds, then every figure
(`measure.py`). Writes `space_peft/demo/model/`: weights in half precision, processor, and `figures.json`. The second
stage's model, which does not answer in sentences yet, is kept in `<work>/silent`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import tokenizers
import torch
import transformers
from build import build_model, build_processor
from concepts import UNSEEN_STYLE
from drawings import load_drawings
from fetch import IMAGE_PACKAGES, NAME_PACKAGE
from language import train_language
from measure import measure
from sentences import shipped_drawings, train_sentences
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from warm_start import warm_start

from space_peft.demo import UNSEEN_STYLE as package_unseen_style


SEED = 0
THREADS = 2
WARM_START = dict(steps=1800, batch_size=128, lr=2e-3, amount=0.45, other_share=0.5, drop=0.5)
LANGUAGE = dict(
    steps=700,
    batch_size=24,
    lr=2e-3,
    copies=12,
    clean_share=0.15,
    amount=0.4,
    naming_steps=60,
    pairs=5,
    polish_steps=60,
)
SENTENCES = dict(
    steps=450,
    batch_size=24,
    lr=1e-3,
    copies=8,
    clean_share=0.3,
    amount=0.4,
    questions=4,
    replay_size=16,
    keep_weight=2.0,
)
DEFAULT_TARGET = Path(__file__).resolve().parents[2] / "space_peft" / "demo" / "model"


def replace_folder(scratch: Path, target: Path) -> None:
    """Put `scratch` in the place of `target`, which is only removed once the new folder is complete."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    if old.exists():
        shutil.rmtree(old)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a model in half precision, and its processor."""
    model.set_attn_implementation("sdpa")  # "eager" was for training speed; the reader of the folder chooses
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = None  # loading in float32 sets it, and the folder has one dtype
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def first_stages(work: Path, stage: str) -> None:
    """Stages one and two: from the rendered drawings to `<work>/silent`."""
    drawings = load_drawings(work)
    processor = build_processor()
    model = build_model(processor.tokenizer, SEED)
    checkpoint, started = work / "warm_start.pt", time.perf_counter()
    if stage != "language":
        warm_start(model, processor, drawings, seed=SEED, **WARM_START)
        spent = round(time.perf_counter() - started)
        torch.save({"weights": model.state_dict(), "settings": WARM_START, "seconds": spent}, checkpoint)
    if stage == "warm-start":
        return

    # The second stage always starts from the file and seeds itself: repeating it alone gives the same model.
    stored = torch.load(checkpoint)
    if stored["settings"] != WARM_START:
        raise ValueError(f"{checkpoint} was made with {stored['settings']}, expected {WARM_START}: run all stages.")
    model.load_state_dict(stored["weights"])
    started = time.perf_counter()
    train_language(model, processor, drawings, seed=SEED, log_every=20, **LANGUAGE)
    training = {
        "seed": SEED,
        "threads": THREADS,
        "warm_start": WARM_START,
        "language": LANGUAGE,
        "seconds": {"warm_start": stored["seconds"], "language": round(time.perf_counter() - started)},
        "styles": sorted(set(drawings.style)),
        "concepts": len(drawings.names),
        "drawings_of_concepts": int((drawings.concept < len(drawings.names)).sum()),
        "other_emoji": drawings.n_other,
        "drawings_of_other_emoji": int((drawings.concept >= len(drawings.names)).sum()),
    }
    save(model, processor, work / "silent")
    (work / "silent" / "figures.json").write_text(json.dumps({"training": training}, indent=2) + "\n", encoding="utf-8")


def last_stage(silent: Path, output: Path) -> dict:
    """Stage three: from the second stage's model to `output`; returns its figures."""
    training = json.loads((silent / "figures.json").read_text(encoding="utf-8"))["training"]
    model = AutoModelForImageTextToText.from_pretrained(silent, dtype=torch.float32, attn_implementation="eager")
    drawings, started = shipped_drawings(), time.perf_counter()
    processor = train_sentences(model, AutoProcessor.from_pretrained(silent), drawings, seed=SEED, **SENTENCES)
    training["sentences"] = {**SENTENCES, "styles": sorted(set(drawings.style)), "drawings": len(drawings.style)}
    training["seconds"]["sentences"] = round(time.perf_counter() - started)

    scratch = output.with_name(output.name + ".new")
    save(model, processor, scratch)
    # What is published is measured on what was written, after rounding to half precision.
    saved = AutoModelForImageTextToText.from_pretrained(scratch, dtype=torch.float32)
    figures = {
        "accuracy": measure(saved, AutoProcessor.from_pretrained(scratch)),
        "training": training,
        "unseen_style": UNSEEN_STYLE,
        "weights": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "inflect": version("inflect"),
            "machine": platform.machine(),
            **{package: number for package, number in [*IMAGE_PACKAGES.values(), NAME_PACKAGE]},
        },
    }
    (scratch / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    replace_folder(scratch, output)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="work folder (default: ./work)")
    parser.add_argument("--output", type=Path, default=DEFAULT_TARGET, help="folder to write")
    parser.add_argument(
        "--stage", choices=("all", "warm-start", "language", "sentences"), default="all", help="repeat one stage only"
    )
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    if package_unseen_style != UNSEEN_STYLE:
        raise ValueError(
            f"concepts.py holds out {UNSEEN_STYLE!r} but space_peft.demo says {package_unseen_style!r}: make them equal."
        )
    if args.stage != "sentences":
        first_stages(args.work, args.stage)
    if args.stage in ("all", "sentences"):
        figures = last_stage(args.work / "silent", args.output)
        print(json.dumps(figures["accuracy"]["summary"], indent=2))


if __name__ == "__main__":
    main()
