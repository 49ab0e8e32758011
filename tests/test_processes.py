"""Two processes do what one does with the same global batch; what is run in them is in `process_runs.py`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import process_runs
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_models import text_batch, tiny_llama

from space_peft.config import SpaceLoraConfig
from space_peft.distributed.processes import share_batches
from space_peft.null_space.fitting import fit_null_space


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"


def in_processes(folder, runs, *options, config="ddp", timeout=150):
    """Runs functions of `process_runs` in two processes: by run, the list of what each process returned."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launcher += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", *options]
    process = subprocess.Popen(
        [*launcher, str(Path(process_runs.__file__)), str(folder), json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it started, which may wait for each other
        output, _ = process.communicate()
        pytest.fail(f"the processes hang:\n{output[-4000:]}")
    assert process.returncode == 0, output[-6000:]
    return {
        name: [torch.load(folder / name / f"result-{rank}.pt", weights_only=False) for rank in range(2)]
        for name, *_ in runs
    }


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one, two, tolerance=1e-5):
    a, b = adapter(one), adapter(two)
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().max() <= tolerance, key


def assert_same_run(one, results, tolerance=1e-5):
    """Every process stopped where the single one did, logged the same values, and measured the same certificate."""
    for result in results:
        assert not isinstance(result, str), result
        assert result["steps"] == one["steps"]
        for own, expected in zip(result["log"], one["log"], strict=True):
            values = {key for key in expected if key.startswith(("loss", "p_name", "leak", "grad", "lora", "feature"))}
            assert {"loss_task", "loss_keep", "leak_max", "lora_b_grad_min"} <= values
            assert {key: own[key] for key in values} == pytest.approx(
                {key: expected[key] for key in values}, rel=2e-3, abs=tolerance
            )
        for own, expected in zip(result["certificate"]["layers"], one["certificate"]["layers"], strict=True):
            assert own["change"] == pytest.approx(expected["change"], rel=1e-3, abs=tolerance)
            assert own["bound"] == pytest.approx(expected["bound"], rel=1e-3)
    assert all(result["certificate"] == results[0]["certificate"] for result in results)


# Fitting

FITS = [
    ["uneven", "fit", {"batches": ["text", "image", "text", "text", "image"]}],
    ["one_sided", "fit", {"batches": ["text", "image"] * 2}],  # one process sees no input of the vision tower
    ["fewer_than_processes", "fit", {"batches": ["image"]}],
    ["loader", "fit", {"batches": 7, "loader": True}],
    ["shuffled", "fit", {"batches": 7, "loader": True, "shuffle": True}],
    ["hard", "fit", {"batches": ["image"], "constraint": "hard", "energy": 1.0}],
]


def test_fitting_and_losses_are_shared_and_equal(tmp_path):
    terms = {"sizes": [3, 8], "counts": None}
    too_small = ["too_small", "fit", {"batches": ["image"] * 9, "constraint": "hard", "energy": 1.0, "r": 16}]
    results = in_processes(tmp_path, [*FITS, too_small, ["terms", "loss_terms", terms], ["fsdp1", "fsdp1", {}]])
    for name, _, options in FITS:
        one = process_runs.fit(tmp_path, **options)
        for result in results[name]:
            assert result.keys() == one.keys()
            for layer, expected in one.items():
                own = result[layer]
                assert own["counts"] == expected["counts"], (name, layer)  # every row once
                assert own["shares"] == expected["shares"]
                assert (own["P"] - expected["P"]).abs().max() <= 1e-5, (name, layer)
        for layer in one:
            assert torch.equal(results[name][0][layer]["P"], results[name][1][layer]["P"])
    assert all("null space of layer" in message and "too small" in message for message in results["too_small"])
    assert all("FSDP 1" in message and "fsdp_version: 2" in message for message in results["fsdp1"])
    one = process_runs.loss_terms(tmp_path, **terms)
    for result in results["terms"]:
        torch.testing.assert_close(result["w"], one["w"], rtol=1e-12, atol=0)
        torch.testing.assert_close(result["v"], one["v"], rtol=1e-5, atol=1e-7)  # the loss is float32
        torch.testing.assert_close(result["pairs"], one["pairs"])


def test_one_process_gets_all_batches_as_they_are():
    batches = [text_batch(seed=seed) for seed in range(3)]
    shared = list(share_batches(batches, torch.nn.Linear(1, 1)))
    assert [id(batch) for batch, _ in shared] == [id(batch) for batch in batches]
    assert all(counted for _, counted in shared)


# Training

# "target": "all" with few rows a batch: some retained batches have no image, others do.
RUNS = {
    "language": {
        "max_steps": 8,
        "learning_rate": 0.02,
        "gradient_accumulation_steps": 2,
        "stop_threshold": 0.9,
        "stop_smoothing": 0.2,
    },
    "all": {"target": "all", "isotropy_weight": 5.0, "optim": "sgd", "learning_rate": 0.05, "peft": {"r": 3}},
}
WHOLE_BATCH = {"language": 4, "all": 2}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What a single process does with the whole batch: `(folder, results by run)`."""
    folder = tmp_path_factory.mktemp("one")
    sizes = {name: {"per_device_train_batch_size": WHOLE_BATCH[name]} for name in RUNS}
    return folder, {name: process_runs.erase(folder / name, **sizes[name], **RUNS[name]) for name in RUNS}


def halves(names=tuple(RUNS), **extra):
    return [
        [name, "erase", {"per_device_train_batch_size": WHOLE_BATCH[name] // 2, **RUNS[name], **extra}]
        for name in names
    ]


def check(one_process, folder, results):
    for name in results:
        assert_same_run(one_process[1][name], results[name])
        assert_same_adapter(one_process[0] / name, folder / name)


@pytest.mark.slow  # What processes share is tested quickly in test_fitting_and_losses_are_shared_and_equal.
@pytest.mark.parametrize("names", [["language"], list(RUNS)], ids=len)
def test_ddp_equals_one_process(one_process, tmp_path, names):
    results = in_processes(tmp_path, halves(names))
    assert list(results) == names
    assert results["language"][0]["distributed"] == "MULTI_CPU"
    assert results["language"][0]["steps"] < RUNS["language"]["max_steps"]  # the stopping rule was at work
    check(one_process, tmp_path, results)
    keeps = [entry["loss_keep"] for entry in results["language"][0]["log"]]
    assert max(keeps) > 1e-4  # or the weights of unequal shares would not show


@pytest.mark.slow  # DDP is tested always: what differs is how the weights are cut
def test_fsdp2_equals_one_process(one_process, tmp_path):
    results = in_processes(tmp_path, halves(), config="fsdp2")
    assert all(result["fsdp2"] for name in RUNS for result in results[name])
    assert [result["local_rows"] for result in results["language"]] == [[2], [2]]
    assert [result["local_rows"] for result in results["all"]] == [[2], [1]]  # shards of three rows
    check(one_process, tmp_path, results)


@pytest.mark.slow
def test_fsdp2_with_an_empty_shard(tmp_path):
    run = {"per_device_train_batch_size": 2, "peft": {"r": 1}}
    results = in_processes(tmp_path, [["two", "erase", run]], config="fsdp2")
    assert [result["local_rows"] for result in results["two"]] == [[1], [0]]
    one = process_runs.erase(tmp_path / "one", per_device_train_batch_size=4, peft={"r": 1})
    assert_same_run(one, results["two"])
    assert_same_adapter(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_fsdp2_in_bfloat16(tmp_path):
    run = {"per_device_train_batch_size": 2, "bf16": True}
    results = in_processes(tmp_path, [["two", "erase", run]], "--mixed_precision", "bf16", config="fsdp2")
    for result in results["two"]:
        assert not isinstance(result, str), result
        assert result["log"][-1]["loss"] < result["log"][0]["loss"]
        for layer in result["certificate"]["layers"]:
            assert layer["fitted_change"] <= layer["bound"]


@pytest.mark.slow  # DeepSpeed compiles an extension when it runs for the first time
def test_deepspeed_equals_one_process(one_process, tmp_path):
    pytest.importorskip("deepspeed")
    results = in_processes(tmp_path, halves(), config="zero2", timeout=500)
    assert results["language"][0]["distributed"] == "DEEPSPEED"
    check(one_process, tmp_path, results)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_row_that_deepspeed_cuts_in_two(tmp_path, stage):
    pytest.importorskip("deepspeed")
    # The first half of A (5, 576) and B (192, 5) together ends a third into A's fourth row.
    run = {"per_device_train_batch_size": 2, "peft": {"r": 5, "target_modules": r".*layers\.0\.mlp\.down_proj"}}
    results = in_processes(tmp_path, [["two", "erase", run]], "--zero_stage", stage, config="zero2", timeout=500)
    assert [result["cut_rows"] for result in results["two"]] == [0, 1]
    one = process_runs.erase(tmp_path / "one", **{**run, "per_device_train_batch_size": 4})
    assert_same_run(one, results["two"])
    assert_same_adapter(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero2"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, config):
    if config == "zero2":
        pytest.importorskip("deepspeed")
    run = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    runs = [["whole", "erase", run], ["resumed", "erase", {**run, "resume": checkpoint}]]
    results = in_processes(tmp_path, runs, config=config, timeout=500)
    assert [result["steps"] for result in results["resumed"]] == [4, 4]
    assert_same_adapter(tmp_path / "whole", tmp_path / "resumed", 1e-7)
    before = adapter(tmp_path / "whole" / "checkpoint-2")
    assert any((value - adapter(tmp_path / "resumed")[key]).abs().max() > 1e-5 for key, value in before.items())


# Refused


@pytest.mark.slow
def test_fsdp2_that_saves_shards_is_refused(tmp_path):
    run = ["run", "erase", {"per_device_train_batch_size": 2}]
    results = in_processes(tmp_path, [run], "--fsdp_state_dict_type", "SHARDED_STATE_DICT", config="fsdp2")
    assert all("fsdp_state_dict_type: FULL_STATE_DICT" in result for result in results["run"]), results


@pytest.mark.slow
def test_zero3_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    run = ["run", "erase", {"per_device_train_batch_size": 2}]
    results = in_processes(tmp_path, [run], "--zero_stage", "3", config="zero2", timeout=500)
    assert all("ZeRO 3" in result and "ZeRO 2" in result for result in results["run"]), results


def test_a_model_split_when_loaded_is_refused():
    model = tiny_llama()
    model._tp_size = 2  # what from_pretrained(..., tp_plan="auto") sets
    model = get_peft_model(model, SpaceLoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="split over processes when it was loaded.*FSDP2"):
        fit_null_space(model, [text_batch()], progress=False)
