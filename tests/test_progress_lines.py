"""What a person reads while an erasure trains, and that every field is still logged."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from space_peft import SpaceConfig
from space_peft.trainers.progress import (
    LINES,
    ReadablePrinterCallback,
    ReadableProgressCallback,
    StageCallback,
    log_line,
    use_readable_progress,
)


STEP = {
    "loss": 1.2345678, "grad_norm": 0.1, "learning_rate": 2e-3, "loss_task": 1.2, "loss_suppression": 0.03, "loss_keep": 0.0012,
    "p_name_on_anchors": 0.412, "p_name_on_anchors_max": 0.88, "feature_entropy": 3.0, "lora_b_grad_min": 0.1,
    "lora_b_grad_max": 0.2, "leak_max": 0.1, "leak_mean": 0.05, "epoch": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (STEP, "step 10 of 60: p(name) 0.412, largest 0.880; loss 1.23, of it for retained answers 0.0012"),
        ({"loss": "0.5", "loss_forget": 0.5, "p_name_on_images": 0.1, "p_name_on_images_max": 0.2},
         "step 10 of 60: p(name) 0.100, largest 0.200; loss 0.5"),
        ({"loss": 2.0}, "step 10 of 60: loss 2"),
        ({"eval_loss": -3.24e-08, "eval_keep_agreement": 0.9987, "eval_p_name_on_anchors": 0.01, "eval_p_name_on_anchors_max": 0.3,
          "eval_forget": 0.02, "eval_generality": 0.1, "eval_retain": 0.97, "eval_fluency": 1.0, "eval_runtime": 3.0, "epoch": 1.0},
         "step 10 of 60, evaluated: named on 2% of the test pictures; p(name) 0.010, largest 0.300; "
         "99.9% of the tokens of retained answers as before; 97% of what it knew of other pictures kept"),
        ({"eval_near_loss": 0.1, "eval_near_keep_agreement": 0.5, "eval_mine": 2.0},
         "step 10 of 60, evaluated: 50.0% of the tokens of retained answers as before (near); mine 2"),
        ({"eval_loss": 0.1, "eval_runtime": 3.0}, None),
        ({"train_runtime": 48.3, "train_loss": 0.1, "train_steps_per_second": 3.0}, "trained 10 steps in 48 s"),
        ({"epoch": 1.0}, None),
    ],
)  # fmt: skip
def test_a_log_as_a_line(logs, line):
    assert log_line(logs, TrainerState(global_step=10, max_steps=60)) == line


def test_the_start_page_shows_a_line_of_a_run_with_default_settings():
    logs = {key: value for key, value in STEP.items() if key != "loss_keep"}
    page = " ".join((Path(__file__).parents[1] / "docs" / "start.md").read_text().split())
    assert SpaceConfig("unused").keep_weight == 0
    assert f"`{log_line(logs, TrainerState(global_step=12, max_steps=60))}`" in page
    evaluated = {"loss": 0.0, "keep_agreement": 0.998, "p_name_on_anchors": 0.004, "p_name_on_anchors_max": 0.031}
    evaluated = {f"eval_{key}": value for key, value in evaluated.items()}
    assert f"`{log_line(evaluated, TrainerState(global_step=60, max_steps=60))}`" in page


@pytest.mark.parametrize("steps", [4, 60, 1000])
@pytest.mark.parametrize("kind", [ReadablePrinterCallback, ReadableProgressCallback])
def test_a_run_shows_a_few_lines(kind, steps, capsys):
    callback, state = kind(), TrainerState(max_steps=steps)
    callback.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        state.global_step = step
        logs = dict(STEP)
        callback.on_log(None, state, None, logs=logs)
        assert logs == STEP, "what goes to `report_to` is not touched"
        callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs={"train_runtime": 1.0})
    callback.on_train_end(None, state, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step ", "trained "))]
    assert min(steps, LINES) <= len(lines) - 1 <= LINES + 1
    assert lines[-2].startswith(f"step {steps} of {steps}: p(name)") and lines[-1].startswith("trained")
    callback.on_log(None, state, None, logs={"eval_forget": 0.5})
    assert "evaluated: named on 50% of the test pictures" in capsys.readouterr().out
    state.is_world_process_zero = False
    callback.on_log(None, state, None, logs={"eval_forget": 0.5})
    assert not capsys.readouterr().out


def test_transformers_own_is_replaced_and_what_a_user_passed_stays():
    class Own(ProgressCallback):
        """As a notebook's, or a user's."""

    for quiet, usual, readable in (
        (True, PrinterCallback, ReadablePrinterCallback),
        (False, ProgressCallback, ReadableProgressCallback),
    ):
        for given in ([], [PrinterCallback()], [Own()]):
            handler = CallbackHandler([*given, usual()], None, None, None, None)
            args = SimpleNamespace(disable_tqdm=quiet)
            trainer = SimpleNamespace(args=args, callback_handler=handler, add_callback=handler.add_callback)
            use_readable_progress(trainer)
            # Training begins as a stage before its bar is drawn.
            assert [type(callback) for callback in handler.callbacks] == [StageCallback, *map(type, given), readable]
    handler = CallbackHandler([Own()], None, None, None, None)
    use_readable_progress(SimpleNamespace(args=args, callback_handler=handler, add_callback=handler.add_callback))
    assert [type(callback) for callback in handler.callbacks] == [StageCallback, Own]
