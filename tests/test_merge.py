"""A merged model says what base and adapter say together, has nothing to switch off, and is written whole or not at all."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import text_batch, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from space_peft import SpaceLoraConfig, merge_adapter
from space_peft.canary.check import Canary
from space_peft.cli import main
from space_peft.demo import demo_model_path, load_demo_images, load_demo_model
from space_peft.modeling.fingerprint import fingerprint_base
from space_peft.modeling.prompts import build_batch


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

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        merge_adapter(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_the_trained_chat_template_comes_along(adapter, tmp_path):
    _, processor = load_demo_model()
    trained = processor.chat_template.replace("\n", "\n{# trained #}", 1) + "{# of the adapter #}"
    processor.chat_template = trained
    processor.save_pretrained(adapter)
    merged = AutoProcessor.from_pretrained(merge_adapter(adapter, tmp_path / "merged"))
    assert merged.chat_template == trained != AutoProcessor.from_pretrained(demo_model_path()).chat_template
    processor.chat_template = "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}"
    processor.save_pretrained(adapter)
    with pytest.raises(ValueError, match="chat template of the adapter"):
        merge_adapter(adapter, tmp_path / "endless")
    assert not (tmp_path / "endless").exists()


@pytest.fixture
def text_adapter(tmp_path):
    """A text-only base with a tokenizer, and an adapter with a chat template of its own."""
    tokenizer = load_demo_model()[1].tokenizer
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, SpaceLoraConfig(r=2, target_modules=["q_proj"], constraint="none"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.chat_template = "{{ messages[0]['content'] + '!' }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_text_only_model_is_merged(text_adapter, tmp_path):
    folder = merge_adapter(text_adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    batch = text_batch()
    with torch.no_grad():
        before = base(**batch).logits
        expected = PeftModel.from_pretrained(base, text_adapter).eval()(**batch).logits
        found = merged(**batch).logits
    assert (expected - before).abs().max() > 0.1 and torch.allclose(found, expected, atol=1e-4)
    told = AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert told == "a!"


def test_an_adapter_of_another_model_is_refused(adapter, text_adapter, tmp_path):
    """PEFT would warn, and merge the base model as it is."""
    with pytest.raises(ValueError, match="weights|does not fit"):
        merge_adapter(text_adapter, tmp_path / "merged", base_model=demo_model_path())
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("given, asked", [(None, "a" * 40), ("main", "main")])
def test_the_recorded_commit_is_what_is_loaded(adapter, tmp_path, monkeypatch, given, asked):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": "a" * 40}))
    loaded = {}
    for place in (AutoModelForImageTextToText, AutoProcessor, AutoConfig):

        def load(name, *args, real=place.from_pretrained, kind=place.__name__, **kwargs):
            loaded[kind] = kwargs.get("revision")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(place, "from_pretrained", load)
    merge_adapter(adapter, tmp_path / "merged", **({} if given is None else {"revision": given}))
    assert set(loaded.values()) == {asked} and len(loaded) == 3


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


def test_a_base_model_of_the_same_shapes_is_refused(adapter, tmp_path):
    model, processor = load_demo_model()
    Canary((), fingerprint_base(model)).save(adapter)
    merge_adapter(adapter, tmp_path / "merged")
    for name, weight in model.named_parameters():
        if "q_proj" in name:
            weight.data += 0.1
    model.save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="the base model is not the one the adapter was trained on"):
        merge_adapter(adapter, tmp_path / "other", base_model=tmp_path / "tuned")
    assert not (tmp_path / "other").exists()
