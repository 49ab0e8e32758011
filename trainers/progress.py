"""What a person reads while an erasure trains: a line now and then, instead of every field of every step."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback


LINES = 10  # In a run, beside those of evaluation.
_TIMES = ("runtime", "samples_per_second", "steps_per_second")


def log_line(logs: Mapping, state: TrainerState) -> str | None:
    """What a log says, as a line for people; `None` if there is nothing for them in it.

    Args:
        logs (`dict`): What was logged.
        state ([`~transformers.TrainerState`]): Of the run.
    """
    step = f"step {state.global_step}" + (f" of {state.max_steps}" if state.max_steps > 0 else "")
    if "train_runtime" in logs:
        return f"trained {state.global_step} steps in {logs['train_runtime']:.0f} s"
    parts = []
    if "loss" not in logs:
        for key, value in logs.items():
            if isinstance(value, (int, float)) and key not in ("epoch", "total_flos") and not key.endswith(_TIMES):
                parts.append(f"{key.removeprefix('eval_')} {value:.3g}")
        return f"{step}, evaluated: {', '.join(parts)}" if parts else None
    largest = next((key for key in logs if key.startswith("p_name") and key.endswith("_max")), None)
    if largest is not None:
        parts.append(f"p(name) {logs[largest.removesuffix('_max')]:.3f}, largest {logs[largest]:.3f}")
    kept = next((key for key in ("loss_keep", "loss_retain") if key in logs), None)
    loss = f"loss {float(logs['loss']):.3g}"
    parts.append(loss if kept is None else f"{loss}, of it for retained answers {logs[kept]:.2g}")
    return f"{step}: {'; '.join(parts)}"


class _Readable(TrainerCallback):
    """Shows about `LINES` lines in a run; all fields of all steps are in `trainer.state.log_history`, and go to `report_to`."""

    _shown: int | None = None  # The part of the run that the latest line was of.

    def show(self, line: str) -> None:
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        self._shown = None
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
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
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training")

    def show(self, line: str) -> None:
        if self.training_bar is None:  # `evaluate` alone.
            print(line)
        else:
            self.training_bar.write(line)


class BarCallback(ReadableProgressCallback):
    """The bar without the lines, for a caller that says itself what came out: pass it in `callbacks`."""

    def show(self, line: str) -> None:
        """Says nothing."""


def use_readable_progress(trainer) -> None:
    """Replaces the callback with which a Trainer shows its logs; one that a user passed, or a notebook's, stays.

    Args:
        trainer ([`~transformers.Trainer`]): Just made.
    """
    usual, own = (
        (PrinterCallback, ReadablePrinterCallback)
        if trainer.args.disable_tqdm
        else (ProgressCallback, ReadableProgressCallback)
    )
    # Trainer adds its own after those of the user.
    default = next(
        (callback for callback in reversed(trainer.callback_handler.callbacks) if type(callback) is usual), None
    )
    if default is not None:
        trainer.callback_handler.callbacks.remove(default)
        if not any(isinstance(callback, _Readable) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(own())
