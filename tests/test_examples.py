"""The example script, as a user would call it."""

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from space_peft.anchors import anchor_info
from space_peft.anchors.info import anchor_questions
from space_peft.demo import demo_model_path
from space_peft.demo.probes import demo_retain_rows, demo_split
from space_peft.retained.reading import RetainedRows


SCRIPT = Path(__file__).parents[1] / "examples" / "erase_concept.py"


def test_retained_rows_survive_arrow(demo_images, tmp_path):
    """What `to_conversation` reads from a stored dataset is what was put in, images or not."""
    public, _ = demo_split(demo_images, "fox")
    rows = demo_retain_rows("fox", public)[:40]
    Dataset.from_list(rows).save_to_disk(tmp_path / "retain")
    stored = RetainedRows(load_from_disk(tmp_path / "retain"))
    direct = RetainedRows(rows)
    assert stored.has_image() == direct.has_image() and 0 < sum(direct.has_image()) < 40
    for i in range(40):
        a, b = stored[i], direct[i]
        assert a["prompt"] == b["prompt"] and a["completion"] == b["completion"]
        assert [x.tobytes() for x in a["images"]] == [x.convert("RGB").tobytes() for x in b["images"]]


@pytest.mark.slow
def test_erase_concept_script(demo_images, tmp_path):
    public, _ = demo_split(demo_images, "fox")
    public.to_parquet(tmp_path / "pool" / "data.parquet")
    Dataset.from_list(demo_retain_rows("fox", public)[:60]).to_parquet(tmp_path / "retain" / "data.parquet")
    arguments = {
        "model": demo_model_path(), "concept": "fox", "pool": tmp_path / "pool", "retain": tmp_path / "retain",
        "output_dir": tmp_path / "out", "anchors": 2, "refine_steps": 1, "max_steps": 1, "questions": tmp_path / "own.yaml",
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text("naming: ['what is this?']\nopen: [describe the picture.]\n")
    command = [sys.executable, str(SCRIPT)] + [part for k, v in arguments.items() for part in (f"--{k}", str(v))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "space_config.json", "space_anchors.json", "anchors"} <= names
    anchors = load_from_disk(tmp_path / "out" / "anchors")
    assert anchor_info(anchors)["stage"] == "refined" and anchor_questions(anchors).naming == ("what is this?",)
