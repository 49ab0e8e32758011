"""A training step with the constraint against one without, and against a plain Trainer with a stock LoraConfig."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, select_random_anchors
from space_peft.demo import DEMO_QUESTIONS, load_demo_images, load_demo_model
from space_peft.demo.probes import demo_retain_rows, demo_split
from space_peft.modeling.targets import default_target_modules


CONCEPT = "fox"


class StepTimer(TrainerCallback):
    """Times whole optimiser steps: loading, both passes, the optimiser's hooks, logging."""

    def __init__(self):
        self.seconds: list[float] = []
        self._start = None

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self._start is not None:
            self.seconds.append(now - self._start)
        self._start = now


class PlainTrainer(Trainer):
    """The same batches, each under its own labels: two forward passes and one backward."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs["forget"]).loss + model(**inputs["retain"]).loss


def wide_model(smoke: bool):
    """A LLaVA of random weights, wider than the embedded one, for the embedded model's processor."""
    demo, processor = load_demo_model()
    config = demo.config.to_dict()
    hidden, layers = (64, 1) if smoke else (384, 6)
    config["text_config"].update(
        hidden_size=hidden,
        intermediate_size=int(3.5 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        layer_types=None,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).eval(), processor


def make(kind: str, folder: str, smoke: bool, steps: int, device: str) -> Trainer:
    """A trainer on anchors and retained rows of the embedded data: "soft", "none" or "stock"."""
    model, processor = wide_model(smoke)
    public, _ = demo_split(load_demo_images(), CONCEPT)
    anchors = select_random_anchors(CONCEPT, public, k=8, progress=False)
    retained = demo_retain_rows(CONCEPT, public, seed=0)[: 64 if smoke else 320]
    options = {
        "max_steps": steps, "per_device_train_batch_size": 4 if smoke else 16, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": device == "cpu", "seed": 0,
    }  # fmt: skip
    target = default_target_modules(model, "language")
    constraint = "none" if kind == "stock" else kind
    trainer = SpaceTrainer(
        model=model,
        # Both passes, as the plain trainer makes them; a fresh model's own answers are no sentences.
        args=SpaceConfig(
            output_dir=folder,
            stop_threshold=None,
            certificate_share=0.02,
            keep_weight=60.0,
            own_answers=False,
            **options,
        ),
        anchors=anchors,
        retain_dataset=retained,
        processing_class=processor,
        peft_config=SpaceLoraConfig(r=8, lora_alpha=16, constraint=constraint, target_modules=target),
        questions=DEMO_QUESTIONS,
    )
    if kind == "stock":
        plain = get_peft_model(wide_model(smoke)[0], LoraConfig(r=8, lora_alpha=16, target_modules=target))
        args = TrainingArguments(
            output_dir=folder, learning_rate=5e-3, lr_scheduler_type="constant", logging_steps=1,
            remove_unused_columns=False, **options,
        )  # fmt: skip
        trainer = PlainTrainer(
            model=plain, args=args, train_dataset=trainer.train_dataset, data_collator=trainer.data_collator
        )
        trainer.model_accepts_loss_kwargs = False
    return trainer


def step_seconds(kind: str, smoke: bool, steps: int, device: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, folder, smoke, steps + 1, device)
        trainer.remove_callback(PrinterCallback)
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.train()
    return timer.seconds[2:]  # the first ones warm up


def step_ratios(smoke: bool, device: str) -> dict:
    rounds, steps = (1, 4) if smoke else (5, 8)
    medians = {"soft": [], "none": [], "stock": []}
    for number in range(rounds):
        kinds = list(medians)
        for kind in kinds[number % 3 :] + kinds[: number % 3]:
            medians[kind].append(statistics.median(step_seconds(kind, smoke, steps, device)))
            print(kind, round(medians[kind][-1], 4), flush=True)
    pairs = {
        "step_ratio": [a / b for a, b in zip(medians["soft"], medians["none"])],
        "step_ratio_vs_stock_lora": [a / b for a, b in zip(medians["soft"], medians["stock"])],
    }
    result = {key: round(statistics.median(values), 4) for key, values in pairs.items()}
    result["steps"] = {
        "seconds": {kind: [round(value, 4) for value in values] for kind, values in medians.items()},
        "ratios": {key: [round(value, 4) for value in values] for key, values in pairs.items()},
        "steps_a_run": steps - 2,
    }
    return result


def peak_memory(kind: str, smoke: bool, device: str) -> dict:
    """Peak size over a whole run, fitting included, in MB, of this process or of what it holds on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        make(kind, folder, smoke, 2, device).train()
    if device == "cuda":
        return {"kind": kind, "peak": torch.cuda.max_memory_allocated() / 1e6}
    # Not getrusage: what it calls this process's peak includes that of its parent before it was started.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"kind": kind, "peak": int(status["VmHWM"].split()[0]) / 1e3}


def memory_ratios(smoke: bool, device: str) -> dict:
    main = sys.modules["__main__"]
    repeats = 1 if smoke else 5
    flags = ["--device", device, *(["--smoke"] if smoke else [])]
    peaks = {kind: [] for kind in ("soft", "none", "stock")}
    for _ in range(repeats):
        for kind in peaks:
            peaks[kind].append(main.child(["--memory-of", kind, *flags])["peak"])
    print(peaks, flush=True)

    def ratio(other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(peaks["soft"], peaks[other])), 4)

    return {
        "memory_ratio": ratio("none"),
        "memory_ratio_vs_stock_lora": ratio("stock"),
        "memory": {kind: [round(value) for value in values] for kind, values in peaks.items()},
    }


def measure(smoke: bool, device: str) -> dict:
    return {**step_ratios(smoke, device), **memory_ratios(smoke, device)}
