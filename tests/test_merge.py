"""A merged model says what base and adapter say together, has nothing to switch off, and is written whole or not at all."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from space_peft import merge_adapter
from space_peft.cli import main
from space_peft.demo import demo_model_path, load_demo_images, load_demo_model
from space_peft.prompts import build_batch


TARGETS = {
    "vision": r".*vision_tower.*\.(q_proj|fc1)|.*multi_modal_projector\.linear_1",
    "language": r".*language_model.*\.(q_proj|down_proj)",
}


@pytest.fixture(params=["vision", "language"])
def adapter(request, tmp_path):
    """An adapter that changes answers, on either side of the embedded model."""
    model, _ = load_demo_model()
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[request.param]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    model.peft_config["default"].base_model_name_or_path = str(demo_model_path())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model, processor):
    images = load_demo_images().select(range(3))["image"]
    batch = build_batch(processor, ["what is this?"] * 3, images=images)
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_merged_model_is_base_and_adapter(adapter, tmp_path):
    folder = merge_adapter(adapter, tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForImageTextToText.from_pretrained(folder)
    base, processor = load_demo_model()
    before = logits(base, processor)
    expected = logits(PeftModel.from_pretrained(base, adapter), processor)
    found = logits(merged, AutoProcessor.from_pretrained(folder))
    assert (expected - before).abs().max() > 0.1, "the adapter must change something for the test to mean anything"
    assert torch.allclose(found, expected, atol=1e-4)
    assert not [path for path in folder.iterdir() if "adapter" in path.name]
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}


def test_dtype_of_the_base_is_kept(adapter, tmp_path):
    folder = merge_adapter(adapter, tmp_path / "merged", dtype=torch.bfloat16)
    merged = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}


def test_nothing_is_written_over(adapter, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        merge_adapter(adapter, tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_a_failure_leaves_nothing(adapter, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("space_peft.merge.AutoProcessor.from_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        merge_adapter(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_command(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--base-model", str(demo_model_path())]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 2
    assert "choose a new folder" in capsys.readouterr().err


def test_an_adapter_without_a_base_asks_for_one(adapter, tmp_path):
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(demo_model_path()), ""))
    with pytest.raises(ValueError, match="give `base_model`"):
        merge_adapter(adapter, tmp_path / "merged")
