"""The whole job on the embedded model: [`erase`] with its images, questions and probes, as a user calls it with their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from datasets import Dataset

from ..erasing import ANCHORS_FOLDER, Erasure, default_adapter, erase, erase_stages
from ..evaluation import ErasureReport
from ..records.card_data import ErasureCardData
from ..records.folder import CARD_DATA_NAME, PICTURES_FOLDER
from ..records.stages import begin, done, stages
from ..retained.self_distillation import retained_answers
from ..trainers import SpaceConfig
from . import DEMO_QUESTIONS, load_demo_images, load_demo_model
from .probes import demo_probes, demo_retain_rows, demo_split


_BASE = "space-peft/demo-llava"
# What `run_demo` alone writes beside an adapter of this base model; `erase` has no pictures of answers.
_PICTURE = f"{PICTURES_FOLDER}/answers.png"


def demo_retained(concept: str, public: Dataset, model, processor, seed: int, *, progress: bool = True) -> list[dict]:
    """What is retained: labelled rows (`demo_retain_rows`), and a sentence about each public image by the model itself."""
    sentences = retained_answers(
        model, processor, public, questions=DEMO_QUESTIONS.open, per_image=1, names=[concept], progress=progress
    )
    return demo_retain_rows(concept, public, seed=seed) + sentences


def erase_demo(concept: str, folder: str | os.PathLike, *, seed: int = 0, progress: bool = True) -> Erasure:
    """Erases one concept from the embedded model, with the library's defaults, and evaluates it before and after.

    Args:
        concept (`str`): A name the embedded model knows.
        folder (`str` or `os.PathLike`): Gets the anchors; see [`erase`].
        seed (`int`, defaults to 0): Of anchors, adapter, data order and split.
        progress (`bool`, defaults to `True`): Show progress bars.

    Raises:
        ValueError: If the images hold no such concept; the message has the nearest names.
    """
    images = load_demo_images()
    public, _ = demo_split(images, concept)  # Refuses an unknown concept, with the nearest names.
    model, processor = load_demo_model()
    begin("retain")
    retained = demo_retained(concept, public, model, processor, seed, progress=progress)
    done(f"prepared {len(retained)} retained rows, which must not change")
    return erase(
        model,
        concept,
        pool=public,
        selection={"cache_dir": False},  # Nothing is left in the user's cache.
        processor=processor,
        retain_dataset=retained,
        questions=DEMO_QUESTIONS,
        probes=demo_probes(concept, images),
        args=_config(folder, seed, progress),
        progress=progress,
        card_data=ErasureCardData(
            base_model=_BASE,
            license="apache-2.0",
            language="en",
            reason="A demonstration: the embedded model knows drawings of everyday things, and nobody is harmed by one's name.",
        ),
    )


def _config(folder: str | os.PathLike, seed: int, progress: bool) -> SpaceConfig:
    return SpaceConfig(
        str(folder), seed=seed, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=not progress
    )


def run_demo(concept: str, output: str | os.PathLike, *, seed: int = 0, progress: bool = True) -> ErasureReport:
    """What `space-peft demo` does: `erase_demo`, then writes adapter, certificate, report, card and pictures to `output`.

    Args:
        concept (`str`): A name the embedded model knows.
        output (`str` or `os.PathLike`): Folder; one that a former run wrote is replaced once this run has succeeded.
        seed (`int`, defaults to 0): See `erase_demo`.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        [`ErasureReport`]

    Raises:
        FileExistsError: If `output` holds something that no run of the demo wrote.
    """
    from .pictures import draw_pictures  # matplotlib

    output = Path(output)
    if output.exists() and any(output.iterdir()) and not _of_the_demo(output):
        raise FileExistsError(f"{output} holds files of something else; choose another folder, or empty it.")
    # Built beside it and renamed at the end: an interrupted run leaves what was there.
    building = output.with_name(f".{output.name}.building")
    if building.exists():
        shutil.rmtree(building)
    keys = erase_stages(_config(building, seed, progress), default_adapter())
    try:
        with stages(["retain", *keys, "save"], show=progress):
            erasure = erase_demo(concept, building, seed=seed, progress=progress)
            begin("save")
            shutil.rmtree(building / ANCHORS_FOLDER)  # From which a killed call goes on; here it begins anew.
            erasure.trainer.save_model()
            draw_pictures(erasure, building / PICTURES_FOLDER)
            erasure.trainer.create_model_card()  # After the pictures, which it shows.
            if output.exists():
                shutil.rmtree(output)
            building.rename(output)
            done(f"saved adapter, card and pictures to {output}")
    finally:
        if building.exists():
            shutil.rmtree(building)
    assert erasure.report is not None  # The standard probes were asked.
    return erasure.report


def _of_the_demo(folder: Path) -> bool:
    """Whether a folder is what a former run wrote, and may be replaced: one of `erase` or `evaluate` is not."""
    if not (folder / _PICTURE).is_file() or not (folder / CARD_DATA_NAME).is_file():
        return False
    try:
        return ErasureCardData.load(folder).base_model == _BASE
    except ValueError:
        return False
