"""`space-peft bench`: methods unlearn the forgotten people of a suite, one after the other from the same model.

Stands above the trainers, which it imports when it runs; `space_peft.suites` itself trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoProcessor

from ..choices import DtypeName
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..modeling.loading import load_model
from ..records.io import atomic_path, write_json
from ..records.stages import begin, done, stages, track
from ..records.versions import collect_versions
from ..suites import PEOPLE_QUESTIONS, Suite, SuiteReport, SuiteSummary, evaluate_suite, load_suite, summarize
from ..suites.answers import Prompt
from ..suites.extras import require_all
from ..suites.plots import plot_forget_quality
from ..suites.schema import IMAGE_TEXT, Subject, check_choice
from ..suites.statistics import truth_ratio_score
from .places import EMBEDDED


# Of the methods that see pictures of the forgotten: their trainer in `space_peft.trainers`, and what makes it this one.
SEEING: dict[str, tuple[str, str, dict]] = {
    "ga": ("GradDiffTrainer", "GradDiffConfig", {"retain_loss": "none"}),
    "graddiff": ("GradDiffTrainer", "GradDiffConfig", {"retain_loss": "nll"}),
    "kl": ("GradDiffTrainer", "GradDiffConfig", {"retain_loss": "kl"}),
    "npo": ("NPOTrainer", "NPOConfig", {"retain_loss": "kl"}),
}
METHODS = ("space", *SEEING)
ORIGINAL, GOLD = "original", "retain-only"
_SAID = ("utility", "kept", "forgotten")  # In the line of a stage.
COLUMNS = ("utility", "forget_quality", "js", "truth_ratio", "kept", "forgotten", "seconds")


@dataclass(frozen=True)
class BenchSettings:
    """What all methods share.

    Args:
        steps (`int`, defaults to 60): Optimiser steps; of SPACE, for each person.
        learning_rate (`float`, *optional*): By default each method's own.
        rank (`int`, defaults to 8): Of the adapter; `lora_alpha` is twice that.
        seed (`int`, defaults to 0): Of training, and of which pictures are shown.
        batch_size (`int`, defaults to 16): Questions a forward pass in evaluation, and rows to forget a training step.
        anchors (`int`, defaults to 32): Of SPACE: stand-ins for each person.
        refine_steps (`int`, *optional*): Of SPACE: steps of refinement; by default the library's.
        questions ([`QuestionSet`], *optional*): Of SPACE: what stand-ins are asked.
        progress (`bool`, defaults to `True`): Show progress bars.
        training (`dict`, *optional*): Further fields of every trainer's configuration.
    """

    steps: int = 60
    learning_rate: float | None = None
    rank: int = 8
    seed: int = 0
    batch_size: int = 16
    anchors: int = 32
    refine_steps: int | None = None
    questions: QuestionSet = DEFAULT_QUESTIONS
    progress: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Fields of a trainer's configuration."""
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return {
            "max_steps": self.steps,
            "seed": self.seed,
            "per_device_train_batch_size": self.batch_size,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": not self.progress,
            "use_cpu": not torch.cuda.is_available(),
            **rate,
            **self.training,
        }


def training_rows(subjects: Sequence[Subject], suite: Suite, questions: QuestionSet, *, words: bool) -> list[dict]:
    """What subjects are known by, as training rows: what the suite teaches of them, or else their open questions, as they are
    asked; a subject that has none is asked for its name about each picture.

    Args:
        subjects (`list[Subject]`): Of one split.
        suite ([`Suite`]): Whose prompts are used.
        questions ([`QuestionSet`]): The first of `naming` asks for a name.
        words (`bool`): With questions without a picture.

    Returns:
        `list[dict]`: `prompt`, `completion` and `images`.
    """
    rows = []
    for subject in subjects:
        known = subject.training or subject.questions
        own = [q for q in known if q.kind != "classification" and (words or q.modality == IMAGE_TEXT)]
        for question in own:
            shown: Sequence[Any] = ()
            if question.modality == IMAGE_TEXT:
                # A question that shows no picture in particular is one about each of them.
                shown = subject.images if question.image is None else [subject.images[question.image]]
            # Training pairs are put as they are, without what asks for a short or an English answer.
            text = question.question if subject.training else suite.protocol.prompt(question)
            rows += [_row(text, question.answer, [image], question.where) for image in shown or ()]
            if not shown:
                rows.append(_row(text, question.answer, [], question.where))
        if not own:
            rows += [_row(questions.naming[0], subject.name, [image], subject.where) for image in subject.images]
    return rows


def _row(prompt: str, answer: str, images: list, where: str) -> dict:
    opened = [Prompt(prompt, image, where).opened() for image in images]
    return {"prompt": prompt, "completion": answer, **({"images": opened} if opened else {})}


def unlearn(
    method: str, model, processor, suite: Suite, folder: Path, settings: BenchSettings, pool: Dataset | None = None
):
    """One method on one model.

    Args:
        method (`str`): One of `METHODS`.
        model (`PreTrainedModel`): A fresh copy; it is used up.
        processor (`ProcessorMixin`): Its processor.
        suite ([`Suite`]): With the splits "forget" and "retain".
        folder (`pathlib.Path`): Where trainers write.
        settings ([`BenchSettings`]): What all methods share.
        pool (`datasets.Dataset`, *optional*): Public pictures that SPACE finds stand-ins in; it sees no others.

    Returns:
        `PreTrainedModel` or `PeftModel`: The model that forgot.

    Raises:
        ValueError: If the method is unknown, there is nothing to forget with, or SPACE lacks a pool or a name.
    """
    from peft import LoraConfig

    from .. import trainers

    check_choice(method, METHODS, "a method")
    forgotten = suite.split("forget")
    retained = training_rows(suite.split("retain"), suite, settings.questions, words=True)
    if method == "space":
        return _space(model, processor, forgotten, retained, folder, settings, pool)
    trainer_name, config_name, fixed = SEEING[method]
    names = list(dict.fromkeys(name for subject in forgotten for name in (subject.name, *subject.aliases)))
    trainer = getattr(trainers, trainer_name)(
        model,
        getattr(trainers, config_name)(output_dir=str(folder), **{**settings.arguments(), **fixed}),
        forget_dataset=training_rows(forgotten, suite, settings.questions, words=False),
        retain_dataset=retained,
        concept=names[0],
        aliases=names[1:],
        processing_class=processor,
        peft_config=LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank),
    )
    trainer.train()
    return trainer.model


def _space(model, processor, forgotten, retained, folder: Path, settings: BenchSettings, pool: Dataset | None):
    """One request after the other, each from the model that has served those before."""
    import copy

    from ..anchors import refine_anchors, select_anchors
    from ..config import SpaceLoraConfig
    from ..trainers import ErasureLedger, SpaceConfig, SpaceTrainer

    if pool is None:
        raise ValueError(
            "SPACE sees no picture of who is to be forgotten, and finds stand-ins among public ones: pass a `pool` of them."
        )
    for subject in forgotten:
        if not any(character.isalpha() for character in subject.name):
            raise ValueError(
                f"{subject.where}: the suite gives {subject.name!r} no name, and SPACE needs one to erase. Add a column `name`."
            )
    original, ledger = copy.deepcopy(model), ErasureLedger(folder / "requests")
    steps: dict[str, Any] = {} if settings.refine_steps is None else {"steps": settings.refine_steps}
    # Of several people they are counted; of one, what is done for it.
    counted = track(forgotten, "People", show=settings.progress and len(forgotten) > 1)
    for number, subject in enumerate(counted):
        anchors = select_anchors(
            subject.name, pool, aliases=subject.aliases, model=model, processor=processor,
            k=min(settings.anchors, len(pool)), cache_dir=False, progress=settings.progress,
        )  # fmt: skip
        anchors = refine_anchors(
            anchors, model=model, processor=processor, questions=settings.questions, seed=settings.seed,
            progress=settings.progress, **steps,
        )  # fmt: skip
        trainer = SpaceTrainer(
            model,
            SpaceConfig(output_dir=str(folder / f"{number:03d}"), **settings.arguments()),
            anchors=anchors,
            retain_dataset=retained,
            processing_class=processor,
            peft_config=SpaceLoraConfig(r=settings.rank, lora_alpha=2 * settings.rank),
            protect=ledger.protect,
            keep_model=original,
        )
        trainer.train()
        model = ledger.add(trainer)
    return model


def bench_stages(methods: Sequence[str], reference: bool) -> list[str]:
    """Keys of the stages of [`run_bench`], for who shows them among their own.

    Args:
        methods (`list[str]`): See [`run_bench`].
        reference (`bool`): Whether there is a retain-only model.
    """
    return [*["load", "ask_suite"] * (1 + reference), *["load", "unlearn", "ask_suite"] * len(methods), "save"]


def run_bench(
    load_model: Callable[[], tuple[Any, Any]],
    suite: Suite,
    methods: Sequence[str],
    output: str | os.PathLike,
    *,
    settings: BenchSettings | None = None,
    load_reference: Callable[[], tuple[Any, Any]] | None = None,
    pool: Dataset | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a model before anything and after each method, and writes `bench.json`, `bench.md`, `bench.png` and a file
    with every answer for each model.

    Args:
        load_model (`Callable`): Gives a fresh `(model, processor)` each time.
        suite ([`Suite`]): With the splits "forget" and "retain"; others are evaluated where there are.
        methods (`list[str]`): Of `METHODS`.
        output (`str` or `os.PathLike`): Folder.
        settings ([`BenchSettings`], *optional*): What all methods share.
        load_reference (`Callable`, *optional*): Gives a retain-only `(model, processor)`, for forget quality and privleak.
        pool (`datasets.Dataset`, *optional*): Public pictures, for SPACE.
        about (`dict`, *optional*): Noted in `bench.json`, e.g. the model's id.

    Returns:
        `dict`: The content of `bench.json`.

    Raises:
        FileExistsError: If the folder holds something.
        ImportError: If one of the packages behind the metrics is missing.
        ValueError: If a method is unknown, named twice, or cannot run on this suite.
    """
    require_all()
    settings, output = settings or BenchSettings(), Path(output)
    for method in methods:
        check_choice(method, METHODS, "a method")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"expected one or more different methods of {METHODS}, got {list(methods)}.")
    if "space" in methods and pool is None:
        raise ValueError("SPACE needs a `pool` of public pictures.")
    for split in ("forget", "retain"):
        suite.split(split)
    if output.exists() and any(output.iterdir()):
        # What another run left would stand beside what this one writes.
        raise FileExistsError(f"{output} is not empty; choose another folder, or empty it.")

    def load(loads: Callable[[], tuple[Any, Any]], name: str) -> tuple[Any, Any]:
        begin("load", name)
        return loads()

    def evaluate(name: str, model, processor, before=None, reference=None) -> dict[str, SuiteReport]:
        begin("ask_suite", name)
        return {
            split: evaluate_suite(
                model, processor, suite, split, before=(before or {}).get(split), reference=(reference or {}).get(split),
                batch_size=settings.batch_size, seed=settings.seed, progress=settings.progress,
            )
            for split in suite.subjects
        }  # fmt: skip

    models: dict[str, dict] = {}

    def note(name: str, reports: dict[str, SuiteReport], seconds: float) -> None:
        summary = summarize(reports, gold)
        summary.save(output / f"{name}.json")
        models[name] = {**_figures(summary), "seconds": round(seconds, 1), "summary": summary.to_dict(rows=False)}
        found = [f"{key} {models[name][key]:.2f}" for key in _SAID if models[name][key] is not None]
        done(f"asked the suite's questions: {', '.join([name, *found])}")

    with stages(bench_stages(methods, load_reference is not None), show=settings.progress):
        gold = None if load_reference is None else evaluate(GOLD, *load(load_reference, GOLD))
        if gold is not None:
            note(GOLD, gold, 0.0)
        before = evaluate(ORIGINAL, *load(load_model, ORIGINAL), reference=gold)
        note(ORIGINAL, before, 0.0)
        if gold is not None:
            models[GOLD] = models.pop(GOLD)  # After the original, to which all others are compared.
        for method in methods:
            model, processor = load(load_model, f"{ORIGINAL}, for {method}")
            begin("unlearn", method)
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                erased = unlearn(method, model, processor, suite, Path(folder), settings, pool)
                seconds = time.perf_counter() - start
                done(f"unlearned: {method}")
                note(method, evaluate(method, erased, processor, before, gold), seconds)
        begin("save")
        content = {
            "suite": suite.name,
            "source": suite.source,
            "about": dict(about or {}),
            "settings": {**settings.arguments(), "rank": settings.rank, "anchors": settings.anchors},
            "subjects": {split: len(subjects) for split, subjects in suite.subjects.items()},
            "versions": collect_versions(),
            "models": models,
        }
        json.dumps(content, allow_nan=False)  # Refused before anything is written.
        points = {name: {**found, "unlearned": name in methods} for name, found in models.items()}
        plot_forget_quality(points, output / "bench.png", title=f"{suite.name}: {len(suite.split('forget'))} forgotten")
        with atomic_path(output / "bench.md") as temporary:
            temporary.write_text(bench_table(content) + "\n", encoding="utf-8")
        write_json(output / "bench.json", content)
        done(f"saved to {output}")
    return content


def _figures(summary: SuiteSummary) -> dict[str, float | None]:
    """One line of the table."""
    quality = summary.forget_quality.get("all") or next(iter(summary.forget_quality.values()), {})
    rows = summary.reports["forget"].rows
    ratios = [row["truth_ratio"] for row in rows if row.get("truth_ratio") is not None]
    forgotten = [row["forgotten"] for row in rows if "forgotten" in row]
    kept = [row["kept"] for row in summary.reports["retain"].rows if "kept" in row]
    return {
        "utility": summary.utility,
        "forget_quality": quality.get("ks"),
        "js": quality.get("js"),
        "truth_ratio": truth_ratio_score(ratios, forgotten=True),
        "kept": _mean(kept),
        "forgotten": _mean(forgotten),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def bench_table(content: Mapping[str, Any]) -> str:
    """The table of a `bench.json`, in Markdown.

    `kept` is of the retained people's questions that the original model answered right, `forgotten` of the forgotten people's:
    now wrong, without a refusal.
    """
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for name, found in content["models"].items():
        cells = ["-" if found[key] is None else f"{found[key]:.3g}" for key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_command(args: argparse.Namespace) -> dict[str, Any]:
    """`space-peft bench`: returns the content of `bench.json`.

    Args:
        args (`argparse.Namespace`): As `space_peft.cli` parses it.
    """
    for method in args.methods:  # Before a suite is downloaded.
        check_choice(method, METHODS, "a method")
    with stages(["read", *bench_stages(args.methods, args.reference is not None)]):
        begin("read")
        return _bench(args)


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    from .pictures import load_pictures

    options = {} if args.split is None else {"split": args.split}
    if args.suite in ("mllmu", "people"):
        options["training"] = True
    suite = load_suite(args.suite, args.source, **options)
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f"`--limit` must be at least 1, got {args.limit}.")
        suite = replace(suite, subjects={split: found[: args.limit] for split, found in suite.subjects.items()})
    settings = BenchSettings(
        steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        batch_size=args.batch_size,
        # A model that was taught nothing but these people knows their questions only.
        questions=PEOPLE_QUESTIONS if args.suite == "people" else DEFAULT_QUESTIONS,
    )
    pool = None if args.pool is None else load_pictures(args.pool)
    done(f"read the suite {suite.name!r}: {', '.join(f'{len(own)} {split}' for split, own in suite.subjects.items())}")
    return run_bench(
        lambda: load_pair(args.model),
        suite,
        args.methods,
        args.output,
        settings=settings,
        load_reference=None if args.reference is None else lambda: load_pair(args.reference),
        pool=pool,
        about={"model": args.model, "reference": args.reference, "pool": args.pool, "limit": args.limit},
    )


def load_pair(place: str, dtype: DtypeName | None = None) -> tuple:
    """A model and its processor from a folder or the Hub; `EMBEDDED` is the embedded model.

    Args:
        place (`str`): Where it is.
        dtype (`str`, *optional*): To load it in; by default as it was saved, on a CPU float32.
    """
    if place == EMBEDDED:
        from ..demo import load_demo_model

        return load_demo_model()
    where: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    if dtype is not None:
        where["dtype"] = dtype
    return load_model(place, **where), AutoProcessor.from_pretrained(place)
