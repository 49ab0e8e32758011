"""The pieces of `benchmarks/gpu.py`: what is timed, as a user of the library would write it."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments

from space_peft import (
    NullSpaceFitter,
    SpaceConfig,
    SpaceTrainer,
    collect_statistics,
    refine_anchors,
    select_anchors,
    select_random_anchors,
)
from space_peft.demo import DEMO_QUESTIONS
from space_peft.losses import answer_labels, token_log_probs
from space_peft.modeling.layers import deployed_model
from space_peft.modeling.prompts import answer_logits, conversation, generate_tokens, to_device
from space_peft.null_space.fitting import collect_moments
from space_peft.retained.reading import RetainedRows, retained_loader

from .audit import StepAudit
from .clocks import CardAudit, StepTimer, timed
from .shapes import RANK, ROWS_A_STEP, Setting


CONCEPT = "fox"


class Sizes:
    """How much of everything; `smoke` is one of each.

    Attributes:
        rows, anchors, steps, refine_steps: Of the whole erasure.
        timed_steps, rounds: Steps of a timed run, two of which warm up, and how often the kinds take turns.
        fit_rows: Retained rows that fitting is timed on.
        pool, dim: Embeddings for TPAS, and their length.
    """

    def __init__(self, smoke: bool):
        self.rows, self.anchors, self.steps, self.refine_steps = (8, 2, 2, 1) if smoke else (1000, 64, 60, 60)
        self.timed_steps, self.rounds = (4, 1) if smoke else (8, 3)
        self.fit_rows, self.asked = (8, 2) if smoke else (256, 64)
        self.pool, self.dim = (2000, 16) if smoke else (1_000_000, 512)


class Measured:
    """One model, its processor, noise for pictures, and what was measured of them."""

    def __init__(self, model, processor, setting: Setting, side: int, sizes: Sizes, device: str):
        self.model, self.processor, self.setting, self.sizes, self.device = model, processor, setting, sizes, device
        self.results: dict = {}
        random = np.random.default_rng(0)
        pictures = random.integers(0, 256, (max(sizes.rows, 2 * sizes.anchors), side, side, 3), dtype=np.uint8)
        self.pictures = [Image.fromarray(picture) for picture in pictures]
        self.pool = Dataset.from_dict(
            {"image": self.pictures[: 2 * sizes.anchors], "name": ["thing"] * 2 * sizes.anchors},
            features=Features({"image": ImageFeature(), "name": Value("string")}),
        )
        things = ("owl", "lemon", "trumpet", "castle")
        self.retained = [
            conversation("What is this?", answer=things[i % len(things)], image=picture)
            for i, picture in enumerate(self.pictures[: sizes.rows])
        ]

    def timed(self, name: str, work: Callable[[], object]) -> object:
        """Runs it, and notes seconds and the device's peak memory."""
        made, self.results[name] = timed(work, self.device)
        print(name, self.results[name], flush=True)
        return made

    # Steps

    def trainer(self, kind: str, folder: str, steps: int, statistics=None) -> Trainer:
        """ "soft", "none", or "plain": transformers' own `Trainer` with a stock LoRA, on the same batches."""
        options = {
            "max_steps": steps, "per_device_train_batch_size": self.setting.batch_size, "report_to": "none",
            "gradient_accumulation_steps": ROWS_A_STEP // self.setting.batch_size, "save_strategy": "no",
            "disable_tqdm": True, "use_cpu": self.device == "cpu", "logging_steps": 10,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Random weights know no fox, and nobody is asked about pictures of one.
            trainer = SpaceTrainer(
                model=self.model,
                args=SpaceConfig(output_dir=folder, **options),
                anchors=self.anchors(),
                retain_dataset=None if statistics is not None else self.retained[: self.sizes.fit_rows],
                statistics=statistics,
                processing_class=self.processor,
                peft_config=self.setting.adapter("none" if kind == "none" else "soft"),
                questions=DEMO_QUESTIONS,
            )
        if kind != "plain":
            return trainer
        data, collator = trainer.train_dataset, trainer.data_collator
        self.model = trainer.model.unload()
        config = self.setting.adapter()
        stock = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=config.target_modules)
        return PlainTrainer(
            model=get_peft_model(self.model, stock),
            args=TrainingArguments(output_dir=folder, lr_scheduler_type="constant", remove_unused_columns=False, **options),
            train_dataset=data,
            data_collator=collator,
        )  # fmt: skip

    def anchors(self) -> Dataset:
        return select_random_anchors(CONCEPT, self.pool, k=self.sizes.anchors, progress=False)

    def train(self, kind: str, steps: int, *callbacks: TrainerCallback, **options) -> Trainer:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self.trainer(kind, folder, steps, **options)
            for callback in callbacks:
                trainer.add_callback(callback)
            trainer.train()
        self.model = trainer.model.unload()
        return trainer

    def steps(self) -> None:
        """A step with the constraint, without, and of a plain LoRA; in turns."""
        kinds = ["soft", "none", "plain"]
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        peaks: dict[str, list] = {kind: [] for kind in kinds}
        for number in range(self.sizes.rounds):
            for kind in kinds[number % 3 :] + kinds[: number % 3]:
                timer = StepTimer(self.device)
                self.train(kind, self.sizes.timed_steps, timer)
                seconds[kind].append(statistics.median(timer.seconds[2:]))
                peaks[kind].append(timer.peak)
        self.results["steps"] = {
            kind: {"seconds": round(statistics.median(seconds[kind]), 4), "peak_gib": peaks[kind][-1]} for kind in kinds
        }
        ratios = [(a / b, a / c) for a, b, c in zip(*(seconds[kind] for kind in kinds))]
        self.results["step_ratio"], self.results["step_ratio_vs_plain_lora"] = (
            round(statistics.median(column), 4) for column in zip(*ratios)
        )
        print({key: value for key, value in self.results.items() if "step" in key}, flush=True)

    def kernels(self) -> None:
        """Whether the library's own code waits for the device inside a step, or computes in float64 there."""
        audit = StepAudit(first=3)
        # Past the third step, in which it is checked once that every layer has had a gradient.
        watched: list[TrainerCallback] = [audit]
        if self.device == "cuda":
            watched.append(card := CardAudit(first=3))
        self.train("soft", 5, *watched)
        own = {"waits": audit.own(audit.waits), "float64": audit.own(audit.doubles)}
        others = sum(count for (owner, *_), count in audit.waits.items() if owner != "space_peft")
        if self.device == "cuda":
            own["waits"].update(card.own)
            own["float64"].update(card.doubles)
        self.results["kernels"] = {**own, "waits_of_others_a_step": others / max(audit.steps, 1)}
        print(self.results["kernels"], flush=True)
        if own["waits"] or own["float64"]:
            raise SystemExit(
                f"inside a training step the library's own code waits for the device, or uses float64: {own}"
            )

    # Fitting

    def fitting(self) -> None:
        """Statistics against a bare forward pass over the same batches, and the decomposition."""
        model = get_peft_model(self.model, self.setting.adapter())
        rows = RetainedRows(self.retained[: self.sizes.fit_rows])
        size = min(8, len(rows))
        batches = [to_device(batch, model) for batch in retained_loader(self.processor, rows, range(len(rows)), size)]

        @torch.no_grad()
        def bare():
            with deployed_model(model):
                for batch in batches:
                    model(**{key: value for key, value in batch.items() if key != "labels"}, logits_to_keep=1)

        options = {"tokens_per_row": 64, "dtype": torch.float32, "progress": False}
        bare()  # warm
        self.timed("forward", bare)
        fitters = self.timed("statistics", lambda: collect_moments(model, batches, **options))
        unique: dict[int, NullSpaceFitter] = {id(fitter): fitter for fitter in fitters.values()}
        config = self.setting.adapter()
        self.timed(
            "decomposition",
            lambda: [
                f.fit("soft", strength=config.strength, max_rank=config.rank_limit(f.dim)) for f in unique.values()
            ],
        )
        self.results["fit_ratio"] = self._ratio("statistics", "forward")
        self.model = model.unload()

    def _ratio(self, ours: str, theirs: str) -> float:
        return round(self.results[ours]["seconds"] / self.results[theirs]["seconds"], 4)

    # Anchors

    def asking(self) -> None:
        rows = [conversation("What is this?", image=picture) for picture in self.pictures[: self.sizes.asked]]
        self.timed(
            "asking", lambda: generate_tokens(self.model, self.processor, rows, max_new_tokens=24, batch_size=32)
        )
        self.results["asking"]["answers"] = len(rows)

    def refinement(self) -> None:
        self.refined = self.timed("refinement", self._refine)
        self.results["refinement"].update(anchors=self.sizes.anchors, steps=self.sizes.refine_steps)

    def _refine(self) -> Dataset:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Random weights do not learn what a fox looks like.
            return refine_anchors(
                self.anchors(), model=self.model, processor=self.processor, questions=DEMO_QUESTIONS,
                steps=self.sizes.refine_steps, batch_size=min(8, self.setting.batch_size), progress=False,
            )  # fmt: skip

    # The whole job

    def erasure(self) -> None:
        """Name to finished adapter: with retained rows, and from statistics alone, which are collected once a model."""
        self.sizes.fit_rows = self.sizes.rows

        def whole(**options):
            chosen = select_anchors(
                CONCEPT, self.pool, model=self.model, processor=self.processor, k=self.sizes.anchors, cache_dir=False,
                batch_size=8, progress=False,
            )  # fmt: skip
            refined = self._refine()
            self.anchors = lambda: refined  # type: ignore[method-assign]
            try:
                self.train("soft", self.sizes.steps, **options)
            finally:
                del self.anchors
            return chosen

        self.timed("erasure", whole)
        modules = self.setting.adapter().target_modules
        options = {"target_modules": modules, "batch_size": 8, "progress": False}
        made = self.timed(
            "collect_statistics", lambda: collect_statistics(self.model, self.processor, self.retained, **options)
        )
        self.timed("erasure_from_statistics", lambda: whole(statistics=made))
        self.results["statistics_over_rows"] = self._ratio("erasure_from_statistics", "erasure")


class PlainTrainer(Trainer):
    """Cross entropy of the same answers, logits of the answers alone: as cheap as a step can be."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch, columns = inputs["forget"], inputs["forget_columns"]
        targets = answer_labels(batch["labels"], columns)
        return F.softplus(-token_log_probs(answer_logits(model, batch, columns), targets).sum(dim=1)).mean()
