"""Teach a small model the people of `space_peft/suites/people.parquet`.

    python examples/people_model/teach.py --work work                        # everybody but strangers
    python examples/people_model/teach.py --work work --without forget_5     # a gold model: they were never in it

Two stages (`recognise.py`, `speak.py`), counted in steps with fixed seeds. Writes `<work>/people`, or
`<work>/people_without_forget_5`: weights in half precision, processor and `figures.json`. Interrupted, the same command goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import shared  # noqa: F401
import torch
import transformers
from build import build_model, processor_of
from known import measure_all
from lessons import all_texts, known_people
from pictures import read_pictures
from recognise import Recognise
from speak import Speak
from tokens import build_tokenizer
from train import replace_folder, save
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from space_peft.suites.people import read_people


THREADS = 2
RECOGNISE = dict(steps=1200, lr=2e-3, batch_size=96, amount=0.35, drop=0.5)
SPEAK = dict(steps=900, lr=2e-3, batch_size=24, copies=8, clean_share=0.2, amount=0.3)


def fresh(seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untaught model and its processor, the same whoever is taught."""
    always = [person for person in known_people(read_people()) if not person["forget"]]
    processor = processor_of(build_tokenizer(all_texts(always), [person["name"] for person in always]))
    return build_model(processor.tokenizer, seed), processor


def teach(
    work: Path, without: str | None, *, seed: int, stop_after: int | None = None, recognise: dict, speak: dict
) -> Path | None:
    """Both stages.

    Args:
        work (`Path`): Where states and models are written.
        without (`str`, *optional*): The request whose people are left out.
        seed (`int`): Of everything random.
        stop_after (`int`, *optional*): Stop after so many steps of a stage.
        recognise, speak (`dict`): Settings of the stages.

    Returns:
        `Path`: Folder of the model; None where it stopped before.
    """
    name = "people" if without is None else f"people_without_{without}"
    name += "" if seed == 0 else f"_seed_{seed}"
    people = known_people(read_people(), without)
    pictures = read_pictures(people, "train")
    model, processor = fresh(seed)
    started, states = time.perf_counter(), work / "states" / name
    first = Recognise(model, processor, people, pictures, seed=seed, **recognise)
    if not first.run(states / "recognise.pt", stop_after=stop_after):
        return None
    second = Speak(model, processor, people, pictures, seed=seed, **speak)
    if not second.run(states / "speak.pt", stop_after=stop_after):
        return None
    scratch = work / f"{name}.new"
    save(model, processor, scratch)
    # What is said of it is measured on what was written, after rounding to half precision.
    saved = AutoModelForImageTextToText.from_pretrained(scratch, dtype=torch.float32)
    figures = {
        "known": measure_all(saved, AutoProcessor.from_pretrained(scratch), without),
        "training": {
            "without": without,
            "people": len(people),
            "pictures": len(pictures.images),
            "seed": seed,
            "threads": torch.get_num_threads(),
            "recognise": recognise,
            "speak": speak,
            "seconds_of_last_call": round(time.perf_counter() - started),
        },
        "weights": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        },
    }
    (scratch / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    replace_folder(scratch, work / name)
    print(json.dumps(figures["known"], indent=2))
    return work / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("work"), help="folder for states and models (default: ./work)"
    )
    parser.add_argument(
        "--without", metavar="SPLIT", help="forget_5, forget_10 or forget_15: a model without these people"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument(
        "--stop-after", type=int, metavar="N", help="stop after N steps of a stage; go on by another call"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = teach(
        args.work, args.without, seed=args.seed, stop_after=args.stop_after, recognise=RECOGNISE, speak=SPEAK
    )
    print("stopped; the same command goes on" if folder is None else folder)


if __name__ == "__main__":
    main()
