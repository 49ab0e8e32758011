"""What a person reads while an erasure trains: a line now and then, instead of every field of every step.

In a job with stages (`space_peft.records.stages`) training is one of them: its bar says how sure the model still is of the
name, and a line at the end how it was left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from space_peft.config import SpaceLoraConfig
from space_peft.evaluation.keys import KEYS
from space_peft.records.stages import bar, begin, done, in_stages


if TYPE_CHECKING:
    from peft import LoraConfig

    from .erasure_config import ErasureConfig


LINES = 10  # In a run, beside those of evaluation.
# What an evaluation says that is no probe: said in words, or left to `trainer.state.log_history`.
_EVALUATED = ("runtime", "samples_per_second", "steps_per_second", "loss", "keep_agreement", "epoch", "total_flos")


def log_line(logs: Mapping, state: TrainerState) -> str | None:
    """What a log says, as a line for people; `None` if there is nothing for them in it.

    Args:
        logs (`dict`): What was logged.
        state ([`~transformers.TrainerState`]): Of the run.
    """
    step = f"step {state.global_step}" + (f" of {state.max_steps}" if state.max_steps > 0 else "")
    if "train_runtime" in logs:
        return f"trained {state.global_step} steps in {logs['train_runtime']:.0f} s"
    if "loss" not in logs:
        parts = _evaluated(logs)
        return f"{step}, evaluated: {'; '.join(parts)}" if parts else None
    parts = _name_probability(logs)
    kept = next((key for key in ("loss_keep", "loss_retain") if key in logs), None)
    loss = f"loss {float(logs['loss']):.3g}"
    parts.append(loss if kept is None else f"{loss}, of it for retained answers {logs[kept]:.2g}")
    return f"{step}: {'; '.join(parts)}"


def _name_probability(logs: Mapping) -> list[str]:
    """How sure the model is of the name, on what it is trained on."""
    largest = next((key for key in logs if "p_name" in key and key.endswith("_max")), None)
    if largest is None:
        return []
    return [f"p(name) {logs[largest.removesuffix('_max')]:.3f}, largest {logs[largest]:.3f}"]


def _evaluated(logs: Mapping) -> list[str]:
    """The few figures of an evaluation that say how it goes: all are in the log, and in the report."""
    values = {key.removeprefix("eval_"): value for key, value in logs.items() if isinstance(value, (int, float))}
    parts = []
    if "forget" in values:
        parts.append(f"named on {values['forget']:.0%} of the test pictures")
    parts += _name_probability(values)
    for key, value in values.items():
        if key.endswith("keep_agreement"):
            of = key.removesuffix("keep_agreement").strip("_")
            parts.append(f"{value:.1%} of the tokens of retained answers as before" + (f" ({of})" if of else ""))
    if "retain" in values:
        parts.append(f"{values['retain']:.0%} of what it knew of other pictures kept")
    # What somebody has added.
    known = (*KEYS, *_EVALUATED)
    return parts + [f"{key} {value:.3g}" for key, value in values.items() if key not in known and not _ours(key)]


def _ours(key: str) -> bool:
    return key.startswith("p_name") or key.endswith(_EVALUATED)


class StageCallback(TrainerCallback):
    """In a job with stages: training is one of them."""

    _name = ""  # How sure the model is of the name, as far as it is known.

    def on_train_begin(self, args, state, control, **kwargs):
        begin("train")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self._name = ", ".join(["", *_name_probability(logs)])

    def on_train_end(self, args, state, control, **kwargs):
        done(f"trained {state.global_step} steps{self._name}")


class _Readable(TrainerCallback):
    """Shows about `LINES` lines in a run; all fields of all steps are in `trainer.state.log_history`, and go to `report_to`."""

    _shown: int | None = None  # The part of the run that the latest line was of.

    def show(self, line: str) -> None:
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        self._shown = None
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or in_stages():
            return
        if "loss" in logs and state.max_steps > 0:
            part = state.global_step * LINES // state.max_steps
            if part == self._shown:
                return
            self._shown = part
        if (line := log_line(logs, state)) is not None:
            self.show(line)


class ReadablePrinterCallback(_Readable, PrinterCallback):
    """Instead of transformers' [`PrinterCallback`], where progress bars are off."""

    def show(self, line: str) -> None:
        print(line)


class ReadableProgressCallback(_Readable, ProgressCallback):
    """Instead of transformers' [`ProgressCallback`], in a terminal: its bar with a name."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._shown, self.current_step = None, 0  # And not what it inherits: that bar has no name.
        if state.is_world_process_zero:
            self.training_bar = bar("Training", state.max_steps, leave=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if in_stages() and self.training_bar is not None and (said := _name_probability(logs or {})):
            self.training_bar.set_postfix_str(said[0].partition(", ")[0])

    def show(self, line: str) -> None:
        if self.training_bar is None:  # `evaluate` alone.
            print(line)
        else:
            tqdm.write(line)


def training_stages(args: ErasureConfig, adapter: LoraConfig, retained: bool) -> list[str]:
    """Keys of the stages that training has, with all that belongs to it (`space_peft.records.stages`).

    Args:
        args ([`ErasureConfig`]): Of the trainer.
        adapter ([`~peft.LoraConfig`]): What it trains.
        retained (`bool`): Whether it is given retained rows.
    """
    constrained = isinstance(adapter, SpaceLoraConfig)
    there = {
        "ask": True, "fit": constrained, "train": True,
        "certify": constrained and retained and args.certificate_share, "canary": args.canary_items,
    }  # fmt: skip
    return [key for key, has in there.items() if has]


def use_readable_progress(trainer) -> None:
    """Replaces the callback with which a Trainer shows its logs; one that a user passed, or a notebook's, stays. Training
    becomes a stage.

    Args:
        trainer ([`~transformers.Trainer`]): Just made.
    """
    usual, own = (
        (PrinterCallback, ReadablePrinterCallback)
        if trainer.args.disable_tqdm
        else (ProgressCallback, ReadableProgressCallback)
    )
    callbacks = trainer.callback_handler.callbacks
    # Trainer adds its own after those of the user.
    default = next((callback for callback in reversed(callbacks) if type(callback) is usual), None)
    if default is not None:
        callbacks.remove(default)
        if not any(isinstance(callback, _Readable) for callback in callbacks):
            trainer.add_callback(own())
    # Before whatever draws a bar, which is the stage's; after fitting, which is another one.
    shows = (PrinterCallback, ProgressCallback)
    places = (place for place, callback in enumerate(callbacks) if isinstance(callback, shows))
    callbacks.insert(next(places, len(callbacks)), StageCallback())
