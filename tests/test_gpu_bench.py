"""`benchmarks/gpu.py` without a card: what it would choose, and the table it prints. Its smoke test runs the rest."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import where_time_goes  # noqa: E402
from gpu_parts import shapes, table  # noqa: E402


@pytest.fixture
def plans(monkeypatch):
    """The shapes "7B" and "tiny" alone, the plan of each made once."""
    real, known = shapes.plan_of, {}
    monkeypatch.setattr(shapes, "SHAPES", {name: shapes.SHAPES[name] for name in ("7B", "tiny")})

    def plan_of(setting, rows):
        key = setting.shape, setting.target_modules
        if key not in known:
            known[key] = real(setting, rows)
        return known[key]

    monkeypatch.setattr(shapes, "plan_of", plan_of)
    return plan_of


def first(wanted, bits, gigabytes):
    return next(shapes.settings_for(wanted, bits, 1e9 * gigabytes, rows=1000), None)


def test_the_setting_most_like_what_was_asked_for_is_chosen(plans):
    large = first("7B", 16, 400)
    assert (large.shape, large.batch_size, len(large.target_modules), large.said) == ("7B", 16, 7, "")
    # Sums of all layers do not fit beside the weights, those without the widest input do.
    small = first("7B", 16, 80)
    assert small.shape == "7B" and "down_proj" not in small.target_modules and small.batch_size < 16
    assert "down_proj is not adapted" in small.said and f"{small.batch_size} rows a pass" in small.said
    quantised = first("7B", 4, 80)
    assert quantised.shape == "7B" and quantised.batch_size >= small.batch_size
    tiny = first("7B", 16, 8)
    assert tiny.shape == "tiny" and tiny.wanted == "7B" and "7B was asked for" in tiny.said
    assert first("7B", 16, 1e-3) is None
    # Whatever was chosen has room, by the plan it was chosen by.
    for setting, memory in ((small, 80e9), (tiny, 8e9)):
        size = shapes.needed(plans(setting, 1000), 16, setting.batch_size)
        assert max(plans(setting, 1000).fitting, plans(setting, 1000).training) <= size <= 0.85 * memory


def test_the_table_has_a_column_for_each_run_and_says_what_is_smaller():
    step = {
        kind: {"seconds": value, "peak_gib": 40.25} for kind, value in (("plain", 1.0), ("none", 1.0), ("soft", 1.02))
    }
    runs = [
        {
            "setting": {"shape": "7B", "wanted": "7B", "bits": 16, "said": "4 rows a pass, 4 passes a step"},
            "steps": step, "step_ratio": 1.02, "kernels": {"waits": {}, "float64": {"a": 2}},
            "two_processes": {"failed": "no port"},
        },
        {"setting": {"shape": "3B", "wanted": "3B", "bits": 4, "said": ""}, "asking": {"seconds": 3.0, "peak_gib": None}},
    ]  # fmt: skip
    content = {"machine": {"card": "Some card", "memory_gib": 79.1, "torch": "2.13"}, "runs": runs}
    lines = table.table(content).splitlines()
    assert lines[0].startswith("Some card (79.1 GiB)")
    assert lines[2] == "| | 7B, 16 bits | 3B, 4 bits |"
    assert "| a step of SPACE | 1.02 s, 40.2 GiB | - |" in lines
    assert "| asking | - | 3 s |" in lines
    assert "| waits and float64 kernels of ours in a step | 0 and 2 | - |" in lines
    assert "| the same step in two processes | failed | - |" in lines
    assert lines[-1] == "7B, 16 bits: 4 rows a pass, 4 passes a step."
    assert not any("decomposition" in line for line in lines)


def test_time_is_that_of_the_innermost_stage():
    now = [0.0]
    clock = where_time_goes.Clock(lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    inner = clock.watched("inner", spend)

    def outer():
        spend(2)
        inner(3)
        spend(4)

    spend(1)
    clock.watched("outer", outer)()
    with pytest.raises(ZeroDivisionError):
        clock.watched("inner", lambda: spend(5) or 1 / 0)()
    spend(7)
    clock._turn()
    assert clock.seconds == {where_time_goes.REST: 8.0, "outer": 6.0, "inner": 8.0}


def test_every_watched_place_is_there_and_left_as_it_was():
    places = {
        stage: [path for path in paths if "medium" not in path] for stage, paths in where_time_goes.STAGES.items()
    }
    import transformers

    before = transformers.Trainer.training_step
    with where_time_goes.watching(places):
        assert transformers.Trainer.training_step is not before
    assert transformers.Trainer.training_step is before
