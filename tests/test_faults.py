"""Fitting and training killed at random moments: the next run goes on, and ends with what an undisturbed run gives."""

import json
import multiprocessing
import random
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_space_trainer import make_trainer
from tiny_models import image_batch, text_batch, tiny_llava

from space_peft import SpaceLoraConfig
from space_peft.demo import load_demo_model
from space_peft.null_space import load_null_spaces, save_null_spaces
from space_peft.null_space.fitting import fit_null_space
from space_peft.records.folder import FIT_PROGRESS_NAME
from space_peft.trainers.checkpoints import last_complete_checkpoint


PROCESSES = multiprocessing.get_context("forkserver")
# Imported once: a child then starts in milliseconds, and its time goes to what is tested.
PROCESSES.set_forkserver_preload(["pytest", "space_peft.trainers", "space_peft.demo.pipeline", "peft"])


def run_with_kills(work, folder, arguments, kills, longest, generator):
    """Runs `work` in processes until one ends, killing up to `kills` of them; returns how many were killed."""
    for killed in range(kills + 1):
        process = PROCESSES.Process(target=work, args=(folder, *arguments))
        process.start()
        process.join(generator.uniform(0.0, longest) if killed < kills else None)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return killed
        process.kill()
        process.join()
    raise AssertionError("the last run is not killed")


def kill_until(work, arguments, tmp_path, kills, check):
    """Repeats that in fresh folders until `kills` processes were killed, and checks each result."""
    for name in ("warm-up", "undisturbed"):  # the first one starts the server of processes
        undisturbed = tmp_path / name
        undisturbed.mkdir()
        start = time.monotonic()
        assert run_with_kills(work, undisturbed, arguments, 0, 0.0, random.Random(0)) == 0
        longest = time.monotonic() - start
    generator, killed, attempts = random.Random(0), 0, 0
    while killed < kills:
        folder = tmp_path / f"attempt {attempts}"
        folder.mkdir()
        killed += run_with_kills(work, folder, arguments, kills - killed, longest, generator)
        check(undisturbed, folder)
        attempts += 1
        assert attempts < 10 * kills, "hardly any run lives long enough to be killed"


# Fitting


def retained_batches():
    return [
        image_batch(rows=8, seed=seed) if seed % 3 else text_batch(rows=8, length=9, seed=seed) for seed in range(60)
    ]


def adapted_llava():
    torch.set_num_threads(1)
    return get_peft_model(tiny_llava(), SpaceLoraConfig(r=2, target_modules="all-linear"))


def fit(folder):
    with (folder / "log").open("a") as log:
        batches = retained_batches()
        model = adapted_llava()
        passes = []
        model.register_forward_hook(lambda *_: passes.append(1))
        spaces = fit_null_space(model, batches, progress=False, save_to=folder / FIT_PROGRESS_NAME, save_every=1)
        log.write(f"{len(passes)}\n")
    save_null_spaces(folder / "space_stats.safetensors", spaces)


def same_fit(undisturbed, folder):
    one, two = (load_file(path / "space_stats.safetensors") for path in (undisturbed, folder))
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    assert not (folder / FIT_PROGRESS_NAME).exists() and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_fitting_goes_on_where_it_was_killed(tmp_path, kills):
    kill_until(fit, (), tmp_path, kills, same_fit)


def interrupted_fit(folder, after):
    """Leaves the file of a fit that was interrupted after so many batches."""

    class Interrupted(Exception):
        pass

    def batches():
        for index, batch in enumerate(retained_batches()):
            if index == after:
                raise Interrupted
            yield batch

    with pytest.raises(Interrupted):
        fit_null_space(adapted_llava(), batches(), progress=False, save_to=folder / FIT_PROGRESS_NAME, save_every=5)
    return folder / FIT_PROGRESS_NAME


def fitted_with_passes(path, batches=None, **changes):
    model = get_peft_model(tiny_llava(), SpaceLoraConfig(r=2, target_modules="all-linear", **changes))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    spaces = fit_null_space(model, batches or retained_batches(), progress=False, save_to=path, save_every=5)
    return spaces, len(passes)


def test_an_interrupted_fit_repeats_only_what_was_not_saved(tmp_path):
    path = interrupted_fit(tmp_path, after=23)
    spaces, passes = fitted_with_passes(path)
    assert passes == 60 - 20
    undisturbed = fit_null_space(adapted_llava(), retained_batches(), progress=False)
    for name, space in undisturbed.items():
        assert torch.equal(space.eigenvectors, spaces[name].eigenvectors)
        assert space.counts == spaces[name].counts
    assert len({id(space) for space in spaces.values()}) == len({id(space) for space in undisturbed.values()})


def test_what_is_saved_of_another_fit_is_not_used(tmp_path):
    path = interrupted_fit(tmp_path, after=23)
    with pytest.warns(UserWarning, match="another model, other layers or other settings"):
        _, passes = fitted_with_passes(path, tokens_per_row=2)
    assert passes == 60
    path = interrupted_fit(tmp_path, after=23)
    with pytest.raises(RuntimeError, match="are not those of the interrupted fit"):
        fitted_with_passes(path, batches=retained_batches()[::-1])


@pytest.mark.parametrize("damage", ["truncated", "another file"])
def test_a_damaged_file_is_not_used(tmp_path, damage):
    path = interrupted_fit(tmp_path, after=23)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.warns(UserWarning, match="cannot be used"):
        _, passes = fitted_with_passes(path)
    assert passes == 60


# Training


def train(folder, data):
    torch.set_num_threads(1)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "fit_save_steps": 1}
    trainer = make_trainer(load_demo_model(), data, folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a checkpoint passed over
        trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def same_training(undisturbed, folder):
    one, two = (load_file(path / "adapter_model.safetensors") for path in (undisturbed, folder))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    states = [json.loads((path / "checkpoint-6" / "trainer_state.json").read_text()) for path in (undisturbed, folder)]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert load_null_spaces(folder / "space_stats.safetensors")


@pytest.mark.slow  # Quickly: a run resumed in one process, and fitting that was killed.
@pytest.mark.parametrize("kills", [1, 20])
def test_training_goes_on_where_it_was_killed(demo_erasure_data, tmp_path, kills):
    anchors, retain = demo_erasure_data
    kill_until(train, ((anchors, retain[:64]),), tmp_path, kills, same_training)


def test_a_checkpoint_without_its_last_file_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step, content in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
        folder = Path(tmp_path, f"checkpoint-{step}")
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.warns(UserWarning, match="is incomplete") as warned:
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert len(warned) == 2
