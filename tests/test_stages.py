"""What a person sees of a job: numbered stages, one line for each that is over, and nothing of other libraries."""

import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from space_peft import SpaceConfig
from space_peft.cli.options import as_notes, without_bars
from space_peft.records import stages as module
from space_peft.records.stages import STAGES, bar, begin, done, end, say, stages, track
from space_peft.trainers.progress import ReadableProgressCallback, StageCallback


@pytest.fixture
def terminal(capsys, monkeypatch):
    """A terminal: what was shown on its error stream since it was last asked, one state of a line after the other."""
    monkeypatch.setattr(module, "_draws", lambda: True)
    return lambda: [text.strip() for text in re.split(r"[\r\n]+", capsys.readouterr().err) if text.strip()]


def untimed(lines):
    return [re.sub(r", [\d.]+ s$", "", line) for line in lines]


def a_job():
    begin("select")
    with bar("Embedding the pool", 4) as shown:
        shown.update(4)
    begin("refine")
    for _ in track(range(3), "Refining anchors"):
        bar("Within", 2).update()
    done("refined 3 anchors")
    begin("certify")  # Not among them: it belongs to the stage at hand.
    begin("save")


def test_a_stage_has_a_number_a_bar_and_one_line_that_stays(terminal):
    with stages(["select", "refine", "fit", "save"]):
        a_job()
    shown = terminal()
    kept = [line for line in shown if not line.startswith("space-peft: ")]
    assert untimed(kept) == ["[1/4] chose anchors", "[2/4] refined 3 anchors", "[4/4] saved"]
    assert all(re.search(r", [\d.]+ s$", line) for line in kept)
    assert "space-peft: [1/4] choosing anchors ..." in shown
    # What the bar is of, where that is more than the stage's name; nothing of a bar within a bar.
    assert any(
        re.match(r"space-peft: \[1/4\] choosing anchors: embedding the pool: +\d+%.*left$", line) for line in shown
    )
    assert any(
        re.match(r"space-peft: \[2/4\] refining anchors: +\d+%\|.*\| \d of 3, \S+ left$", line) for line in shown
    )
    assert not [line for line in shown if "ithin" in line or "certif" in line]


def test_in_a_file_there_are_lines_alone_and_a_sign_of_life_of_what_takes_long(capsys, monkeypatch):
    with stages(["select", "refine", "save"]):
        a_job()
    assert untimed(capsys.readouterr().err.splitlines()) == [
        "[1/3] chose anchors",
        "[2/3] refined 3 anchors",
        "[3/3] saved",
    ]
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    with stages(["train"]):
        begin("train")
        with bar("Training", 6, initial=2) as shown:
            shown.set_postfix_str("p(name) 0.5")
            for clock[0] in (50.0, 100.0, 140.0, 170.0):
                shown.update()
    assert capsys.readouterr().err.splitlines() == [
        "space-peft: [1/1] training: 4 of 6, 100 s left, p(name) 0.5",
        "space-peft: [1/1] training: 6 of 6, 0 s left, p(name) 0.5",
        "[1/1] trained, 3 min",
    ]


def test_stages_within_a_job_are_among_its_own(capsys):
    with stages(["read", "select", "refine", "save", "select", "refine", "save"]):
        begin("read")
        for number in range(2):
            end()
            say(f"number {number}")
            with stages(["select", "refine", "save"]):
                a_job()
    assert untimed(capsys.readouterr().err.splitlines()) == [
        "[1/7] read the data", "number 0", "[2/7] chose anchors", "[3/7] refined 3 anchors", "[4/7] saved",
        "number 1", "[5/7] chose anchors", "[6/7] refined 3 anchors", "[7/7] saved",
    ]  # fmt: skip


def test_of_several_stages_of_a_kind_each_says_which_one_it_is(terminal):
    with stages(["load", "attack", "attack", "save"]):
        begin("load")
        begin("attack", "hints")
        with bar("Hints", 2) as shown:
            shown.update()
        begin("attack", "audit")
        done("an image found: 0.10")
        begin("save")
    shown = terminal()
    assert untimed([line for line in shown if not line.startswith("space-peft: ")]) == [
        "[1/4] loaded the model", "[2/4] attacked: hints", "[3/4] an image found: 0.10", "[4/4] saved",
    ]  # fmt: skip
    # A bar that is called as its stage is does not repeat it, and the next stage is of nothing.
    assert any(line.startswith("space-peft: [2/4] attack: hints:   0%|") for line in shown)
    assert "space-peft: [4/4] saving ..." in shown


def test_an_error_leaves_no_bar_and_no_line_of_what_did_not_come_about(terminal):
    with pytest.raises(ValueError), stages(["select", "refine"]):
        begin("select")
        begin("refine")
        with bar("Refining anchors", 3):
            raise ValueError
    assert [line for line in untimed(terminal()) if not line.startswith("space-peft")] == ["[1/2] chose anchors"]
    begin("refine")
    assert not terminal(), "outside a job nothing is shown"


def test_without_a_job_a_bar_has_its_own_name_and_stages_say_nothing(terminal):
    a_job()
    with stages(["select", "refine"], show=False):
        a_job()
    with bar("Hidden", 2, show=False) as shown:
        shown.update()
    text = "\n".join(terminal())
    assert "Refining anchors:  " in text and "Embedding the pool:  " in text
    assert "space-peft" not in text and "[1/" not in text and "Hidden" not in text


def test_every_stage_says_what_goes_on_and_what_came_of_it():
    for doing, over in STAGES.values():
        assert doing != over and len(f"space-peft: [10/11] {doing}") < 60


def test_training_is_a_stage_whose_bar_says_how_sure_the_name_is(terminal, capsys):
    state, args = TrainerState(max_steps=2), None
    callbacks = [StageCallback(), ReadableProgressCallback()]

    def all_of(event, **options):
        for callback in callbacks:
            getattr(callback, event)(args, state, None, **options)

    with stages(["fit", "train", "canary"]):
        begin("fit")
        all_of("on_train_begin")
        for state.global_step in (1, 2):
            all_of(
                "on_log",
                logs={"loss": 1.0, "p_name_on_anchors": 0.25 / state.global_step, "p_name_on_anchors_max": 0.5},
            )
            all_of("on_step_end")
        all_of("on_log", logs={"train_runtime": 1.0})
        all_of("on_train_end")
        begin("canary")
    out, shown = capsys.readouterr()
    shown = [text.strip() for text in re.split(r"[\r\n]+", shown)]
    assert not out, "no lines beside it"
    assert untimed([line for line in shown if line and not line.startswith("space-peft")]) == [
        "[1/3] fitted the constraint", "[2/3] trained 2 steps, p(name) 0.125, largest 0.500", "[3/3] made the canary",
    ]  # fmt: skip
    assert any(line.startswith("space-peft: [2/3] training:") and line.endswith("p(name) 0.250") for line in shown)


# The command line


def test_warnings_are_notes_without_a_path_or_a_line_of_source(capsys):
    before = warnings.showwarning
    with as_notes():
        warnings.warn("the pool has no captions.", stacklevel=1)
        warnings.warn_explicit("pinned", UserWarning, "/x/site-packages/torch/utils/data.py", 7)
        logging.getLogger("space_peft.erasing").warning("The anchors in %s are made again.", "out")
    assert capsys.readouterr().err.splitlines() == [
        "note: the pool has no captions.", "note (torch): pinned", "note: The anchors in out are made again.",
    ]  # fmt: skip
    assert warnings.showwarning is before and logging.getLogger("space_peft").propagate
    assert not logging.getLogger("space_peft").handlers


def test_other_libraries_bars_are_off_within_a_command_and_downloads_are_not():
    from datasets import utils as datasets
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers

    def states():
        return (
            datasets.are_progress_bars_disabled(),
            transformers.is_progress_bar_enabled(),
            hub.are_progress_bars_disabled(),
        )

    before = states()
    with without_bars():
        assert states() == (True, False, before[2])
    assert states() == before


def test_a_fresh_clone_installs_without_pips_warnings():
    # Once quiet leaves warnings, such as those of an index that a machine's own configuration names; errors are shown.
    commands = [
        line for line in (Path(__file__).parents[1] / "Makefile").read_text().splitlines() if "pip install" in line
    ]
    assert commands and all(line.count("--quiet") == 2 and "--disable-pip-version-check" in line for line in commands)


def test_nothing_is_pinned_where_there_is_no_accelerator(tmp_path, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)  # noqa: B023
        assert SpaceConfig(str(tmp_path)).dataloader_pin_memory is there
